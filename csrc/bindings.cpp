// The Python binding, minbert.kernels._native. Tensors arrive as addresses; their dtypes, sizes and layouts have been
// checked in Python (kernels/checks.py). The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch.h"
#include "philox.h"

namespace py = pybind11;

namespace minbert {
namespace {

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

constexpr std::pair<const char*, Isa> kIsaNames[] = {
    {"portable", Isa::portable}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

Isa current_isa = best_isa();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : kIsaNames)
    if (supports(isa)) names.emplace_back(name);
  return names;
}

void set_isa(const std::string& wanted) {
  if (wanted == "auto") {
    current_isa = best_isa();
    return;
  }
  for (const auto& [name, isa] : kIsaNames)
    if (wanted == name && supports(isa)) {
      current_isa = isa;
      return;
    }
  std::string known = "auto";
  for (const auto& name : isas()) known += ", " + name;
  throw py::value_error("set_isa: expected one of " + known + " (what this processor runs), got " + wanted);
}

std::string get_isa() { return kIsaNames[static_cast<int>(current_isa)].first; }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> result;
  for (const Address address : addresses) result.push_back(pointer<T>(address));
  return result;
}

// Arguments come in groups.
using GradientArguments = std::tuple<std::vector<Address>, std::vector<int64_t>, std::vector<int>, int64_t>;

// The arrays behind a TaskGradients view, from addresses [T * K], sizes [K], dtypes [K] and T.
class Gradients {
 public:
  explicit Gradients(const GradientArguments& g)
      : data_(pointers<const void>(std::get<0>(g))),
        sizes_(std::get<1>(g)),
        first_chunk_(1, 0),
        tasks_(std::get<3>(g)) {
    for (const int dtype : std::get<2>(g)) dtypes_.push_back(static_cast<DType>(dtype));
    for (const int64_t size : sizes_) first_chunk_.push_back(first_chunk_.back() + (size + kChunk - 1) / kChunk);
  }

  TaskGradients view() const {
    return {
        tasks_, static_cast<int64_t>(sizes_.size()), data_.data(), dtypes_.data(), sizes_.data(), first_chunk_.data()};
  }

 private:
  std::vector<const void*> data_;
  std::vector<DType> dtypes_;
  std::vector<int64_t> sizes_, first_chunk_;
  int64_t tasks_;
};

using SurgeryArguments =
    std::tuple<int64_t, Address, Address, Address, Address, double, bool, Address, Address, Address>;
std::pair<SurgeryProblem, SurgeryResult> surgery(const SurgeryArguments& arguments) {
  const auto build = [](int64_t tasks, Address gram, Address orders, Address given, Address own_square, double max_norm,
                        bool mean, Address weights, Address stats, Address scratch) {
    return std::pair(SurgeryProblem{tasks, pointer<const double>(gram), pointer<const int64_t>(orders),
                                    pointer<const double>(given), pointer<const double>(own_square), max_norm, mean},
                     SurgeryResult{pointer<double>(weights), pointer<double>(stats), pointer<double>(scratch)});
  };
  return std::apply(build, arguments);
}

using UpdateArguments = std::tuple<std::vector<std::vector<Address>>, std::vector<double>, Address, bool>;

// The arrays behind an AdamWState, from the addresses of parameters, both moments, averages and copies (the last two
// may be empty lists); the step's scalars; and the gate.
class Update {
 public:
  explicit Update(const UpdateArguments& a) : gate{pointer<const void>(std::get<2>(a)), std::get<3>(a)} {
    for (const auto& addresses : std::get<0>(a)) tensors_.push_back(pointers<void>(addresses));
    const std::vector<double>& s = std::get<1>(a);
    step = {s[0], s[1], s[2], s[3], s[4], s[5]};
  }

  AdamWState state() const {
    const auto array = [&](int i) { return tensors_[i].empty() ? nullptr : tensors_[i].data(); };
    return {array(0), array(1), array(2), array(3), array(4)};
  }

  AdamWStep step;
  Gate gate;

 private:
  std::vector<std::vector<void*>> tensors_;
};

using ActivationArguments = std::tuple<int64_t, int64_t, int>;  // rows, columns, dtype
Activation activation(const ActivationArguments& a) {
  return {std::get<0>(a), std::get<1>(a), static_cast<DType>(std::get<2>(a))};
}

// `seed` points to int64 [2], the seed and the number of the op's first row; `row` is the row of the op's that row 0
// is.
Dropout dropout(Address seed, uint32_t threshold, uint32_t stream_id, float scale = 1, int64_t row = 0) {
  if (!seed) return {0, 0, stream_id, scale};
  const auto* const pair = pointer<const int64_t>(seed);
  return {pair[0], threshold, stream_id, scale, static_cast<uint32_t>(pair[1]) + static_cast<uint32_t>(row)};
}

using DropoutArguments = std::tuple<Address, uint32_t, uint32_t, float, int64_t>;  // seed, threshold, stream_id, scale, row
Dropout dropout(const DropoutArguments& d) {
  return dropout(std::get<0>(d), std::get<1>(d), std::get<2>(d), std::get<3>(d), std::get<4>(d));
}

using EmbeddingArguments = std::tuple<std::vector<Address>, std::vector<Address>, int>;  // ids, tables, dtype
Embeddings embeddings(const EmbeddingArguments& e) {
  Embeddings result{{}, {}, static_cast<DType>(std::get<2>(e))};
  for (int i = 0; i < 3; ++i) {
    result.ids[i] = pointer<const int64_t>(std::get<0>(e)[i]);
    result.tables[i] = pointer<const void>(std::get<1>(e)[i]);
  }
  return result;
}

using StartArguments = std::tuple<Address, Address, int, int64_t, int64_t, float, Address, Address, uint32_t>;
NormalStart normal_start(const StartArguments& arguments) {
  const auto& [x, out, dtype, rows, columns, sigma, scale, seed, stream_id] = arguments;
  return {pointer<const void>(x),
          pointer<void>(out),
          static_cast<DType>(dtype),
          rows,
          columns,
          sigma,
          pointer<const float>(scale),
          pointer<const int64_t>(seed),
          stream_id};
}

using AscentArguments = std::tuple<Address, Address, Address, Address, int, Address, int64_t, int64_t, int64_t, float,
                                   float, Address, bool, bool>;
Ascent ascent(const AscentArguments& arguments) {
  const auto& [perturbed, x, grad, out, dtype, cu_seqlens, groups, tokens, columns, eta, epsilon, scale, infinity_norm,
               onto_ball] = arguments;
  return {pointer<const void>(perturbed),
          pointer<const void>(x),
          pointer<const void>(grad),
          pointer<void>(out),
          static_cast<DType>(dtype),
          pointer<const int32_t>(cu_seqlens),
          groups,
          tokens,
          columns,
          eta,
          epsilon,
          pointer<const float>(scale),
          infinity_norm,
          onto_ball};
}

#ifdef MINBERT_WITH_CUDA
// Raises what a CUDA kernel's launch reports.
void launched(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA reports: " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "minbert's native kernels; called by the modules of minbert.kernels, which check the arguments";
  module.attr("INTERFACE") = kInterface;
  module.attr("CHUNK") = kChunk;
  module.attr("CHUNK_PARTS") = kChunkParts;
  module.attr("EMBEDDING_ROWS") = kEmbeddingRows;
#ifdef MINBERT_WITH_CUDA
  module.attr("CUDA") = true;
#else
  module.attr("CUDA") = false;
#endif

  module.def("isas", &isas, "The instruction sets that this processor runs, narrowest first.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use the kernels of one instruction set, or the widest (\"auto\").");
  module.def("get_isa", &get_isa, "The instruction set whose kernels run.");
  module.def("cpu_features", [] {
    const CpuFeatures found = cpu_features();
    py::dict features;
    features["avx2"] = found.avx2;
    features["avx512"] = found.avx512;
    features["avx512_bf16"] = found.avx512_bf16;
    features["amx_bf16"] = found.amx_bf16;
    return features;
  });

  module.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int64_t seed) {
    const Words4 words = philox({{c0, c1, c2, c3}}, seed);
    return std::vector<uint32_t>(words.word, words.word + 4);
  });

  module.def(
      "gram",
      [](const GradientArguments& g, Address partials, Address out, int threads) {
        kernels(current_isa).gram(Gradients(g).view(), pointer<double>(partials), pointer<double>(out), threads);
      },
      Unlocked());

  module.def(
      "surgery_weights",
      [](const SurgeryArguments& arguments) {
        const auto [problem, result] = surgery(arguments);
        kernels(current_isa).surgery_weights(problem, result);
      },
      Unlocked());

  module.def(
      "combine",
      [](const GradientArguments& g, Address weights, const std::vector<Address>& out, int threads) {
        kernels(current_isa)
            .combine(Gradients(g).view(), pointer<const double>(weights), pointers<void>(out).data(), threads);
      },
      Unlocked());

  module.def(
      "combine_adamw",
      [](const GradientArguments& g, Address weights, const UpdateArguments& arguments, int threads) {
        const Update update(arguments);
        kernels(current_isa)
            .combine_adamw(Gradients(g).view(), pointer<const double>(weights), update.state(), update.step,
                           update.gate, threads);
      },
      Unlocked());

  module.def(
      "dropout_mask",
      [](Address keep, int64_t rows, int64_t columns, Address seed, uint32_t threshold, uint32_t stream_id, int threads) {
        kernels(current_isa)
            .dropout_mask(pointer<uint8_t>(keep), rows, columns, dropout(seed, threshold, stream_id), threads);
      },
      Unlocked());

  module.def(
      "attention_dropout_mask",
      [](Address keep, Address cu_seqlens, int64_t sequences, int64_t heads, Address seed, uint32_t threshold,
         uint32_t stream_id, int threads) {
        kernels(current_isa)
            .attention_dropout_mask(pointer<uint8_t>(keep), pointer<const int32_t>(cu_seqlens), sequences, heads,
                                    dropout(seed, threshold, stream_id), threads);
      },
      Unlocked());

  module.def(
      "smart_init",
      [](const StartArguments& start, int threads) { kernels(current_isa).smart_init(normal_start(start), threads); },
      Unlocked());

  module.def(
      "smart_ascend",
      [](const AscentArguments& a, int threads) { kernels(current_isa).smart_ascend(ascent(a), threads); }, Unlocked());

  py::class_<AttentionProblem>(module, "AttentionProblem")
      .def(py::init([](int dtype, Address cu_seqlens, int64_t sequences, int64_t tokens, int64_t max_seqlen,
                       int64_t heads, int64_t head_dim, float scale, Address seed, uint32_t threshold, uint32_t stream_id,
                       float keep_scale) {
        return AttentionProblem{static_cast<DType>(dtype),
                                pointer<const int32_t>(cu_seqlens),
                                sequences,
                                tokens,
                                max_seqlen,
                                heads,
                                head_dim,
                                scale,
                                dropout(seed, threshold, stream_id),
                                keep_scale};
      }))
      .def("scratch", [](const AttentionProblem& problem, bool backward, int threads) {
        return kernels(current_isa).attention_scratch(problem, backward, threads);
      });

  module.def(
      "attention",
      [](const AttentionProblem& problem, Address qkv, const std::vector<int64_t>& strides, Address out,
         Address scratch, int threads) {
        return kernels(current_isa)
            .attention(problem, {pointer<const void>(qkv), strides[0], strides[1], strides[2]}, pointer<void>(out),
                       pointer<void>(scratch), threads);
      },
      Unlocked());

  module.def(
      "attention_backward",
      [](const AttentionProblem& problem, Address grad_out, const std::vector<int64_t>& grad_strides, Address qkv,
         const std::vector<int64_t>& strides, Address grad_qkv, Address scratch, int threads) {
        return kernels(current_isa)
            .attention_backward(problem, {pointer<const void>(grad_out), grad_strides[0], grad_strides[1]},
                                {pointer<const void>(qkv), strides[0], strides[1], strides[2]}, pointer<void>(grad_qkv),
                                pointer<void>(scratch), threads);
      },
      Unlocked());

  module.def("row_scratch", &row_scratch, "How many floats of scratch memory the row-wise kernels take.");

  module.def(
      "dropout_forward",
      [](const ActivationArguments& a, Address x, Address y, const DropoutArguments& d, Address scratch, int threads) {
        kernels(current_isa)
            .dropout_forward(activation(a), pointer<const void>(x), pointer<void>(y), dropout(d),
                             pointer<float>(scratch), threads);
      },
      Unlocked());

  module.def(
      "layer_norm_forward",
      [](const ActivationArguments& a, Address x, Address residual, Address weight, Address bias, float eps,
         const DropoutArguments& d, Address y, Address moments, Address scratch, int threads) {
        kernels(current_isa)
            .layer_norm_forward(activation(a), pointer<const void>(x), pointer<const void>(residual),
                                pointer<const float>(weight), pointer<const float>(bias), eps, dropout(d),
                                pointer<void>(y), pointer<Moments>(moments), pointer<float>(scratch), threads);
      },
      Unlocked());

  module.def(
      "layer_norm_backward",
      [](const ActivationArguments& a, Address d_y, Address x, Address residual, Address weight, Address moments,
         const DropoutArguments& d, Address d_x, Address d_residual, Address d_weight, Address d_bias, Address scratch,
         int threads) {
        kernels(current_isa)
            .layer_norm_backward(activation(a), pointer<const void>(d_y), pointer<const void>(x),
                                 pointer<const void>(residual), pointer<const float>(weight),
                                 pointer<const Moments>(moments), dropout(d), pointer<void>(d_x),
                                 pointer<void>(d_residual), pointer<float>(d_weight), pointer<float>(d_bias),
                                 pointer<float>(scratch), threads);
      },
      Unlocked());

  module.def(
      "gelu_forward",
      [](const ActivationArguments& a, Address x, Address bias, Address y, int threads) {
        kernels(current_isa)
            .gelu_forward(activation(a), pointer<const void>(x), pointer<const float>(bias), pointer<void>(y), threads);
      },
      Unlocked());

  module.def(
      "gelu_backward",
      [](const ActivationArguments& a, Address d_y, Address x, Address bias, Address d_x, Address d_bias,
         Address scratch, int threads) {
        kernels(current_isa)
            .gelu_backward(activation(a), pointer<const void>(d_y), pointer<const void>(x), pointer<const float>(bias),
                           pointer<void>(d_x), pointer<float>(d_bias), pointer<float>(scratch), threads);
      },
      Unlocked());

  module.def(
      "embedding_forward",
      [](const ActivationArguments& a, const EmbeddingArguments& e, Address weight, Address bias, float eps,
         const DropoutArguments& d, Address y, Address moments, Address scratch, int threads) {
        kernels(current_isa)
            .embedding_forward(activation(a), embeddings(e), pointer<const float>(weight), pointer<const float>(bias),
                               eps, dropout(d), pointer<void>(y), pointer<Moments>(moments), pointer<float>(scratch),
                               threads);
      },
      Unlocked());

  module.def(
      "embedding_backward",
      [](const ActivationArguments& a, const EmbeddingArguments& e, Address d_y, Address weight, Address moments,
         const DropoutArguments& d, Address d_total, const std::vector<Address>& d_tables, Address d_weight,
         Address d_bias, Address scratch, int threads) {
        float* const tables[] = {pointer<float>(d_tables[0]), pointer<float>(d_tables[1]), pointer<float>(d_tables[2])};
        kernels(current_isa)
            .embedding_backward(activation(a), embeddings(e), pointer<const void>(d_y), pointer<const float>(weight),
                                pointer<const Moments>(moments), dropout(d), pointer<float>(d_total), tables,
                                pointer<float>(d_weight), pointer<float>(d_bias), pointer<float>(scratch), threads);
      },
      Unlocked());

#ifdef MINBERT_WITH_CUDA
  module.def("cuda_dropout_mask", [](Address keep, int64_t rows, int64_t columns, Address seed, uint32_t threshold,
                                     uint32_t stream_id, Address stream) {
    launched("dropout_mask", cuda_dropout_mask(pointer<uint8_t>(keep), rows, columns, pointer<const int64_t>(seed),
                                               threshold, stream_id, pointer<void>(stream)));
  });
  module.def("cuda_smart_init", [](const StartArguments& start, Address stream) {
    launched("smart_init", cuda_smart_init(normal_start(start), pointer<void>(stream)));
  });
  module.def("cuda_smart_ascend", [](const AscentArguments& a, Address stream) {
    launched("smart_ascend", cuda_smart_ascend(ascent(a), pointer<void>(stream)));
  });

  module.def("cuda_gram", [](const GradientArguments& g, Address partials, Address out, Address stream) {
    launched("gram",
             cuda_gram(Gradients(g).view(), pointer<double>(partials), pointer<double>(out), pointer<void>(stream)));
  });

  module.def("cuda_surgery_weights", [](const SurgeryArguments& arguments, Address stream) {
    const auto [problem, result] = surgery(arguments);
    launched("surgery_weights", cuda_surgery_weights(problem, result, pointer<void>(stream)));
  });

  module.def("cuda_combine",
             [](const GradientArguments& g, Address weights, const std::vector<Address>& out, Address stream) {
               launched("combine", cuda_combine(Gradients(g).view(), pointer<const double>(weights),
                                                pointers<void>(out).data(), pointer<void>(stream)));
             });

  module.def("cuda_combine_adamw", [](const GradientArguments& g, Address weights, const UpdateArguments& arguments,
                                      Address stream) {
    const Update update(arguments);
    launched("combine_adamw_", cuda_combine_adamw(Gradients(g).view(), pointer<const double>(weights), update.state(),
                                                  update.step, update.gate, pointer<void>(stream)));
  });
#endif
}

}  // namespace minbert
