// The Python binding, minbert.kernels._native. Tensors arrive as addresses; Python has checked their dtypes, sizes and
// layouts (kernels/checks.py). Kernels run without the interpreter's lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gradient_parts.h"
#include "kernels.h"
#include "philox.h"

namespace py = pybind11;

namespace minbert {

// A type that Python passes as an int.
template <class T, class Int>
struct IntCaster {
  PYBIND11_TYPE_CASTER(T, py::detail::const_name("int"));

  bool load(py::handle source, bool convert) {
    py::detail::make_caster<Int> number;
    if (!number.load(source, convert)) return false;
    value = T{static_cast<Int>(number)};
    return true;
  }
};

// Numbers, which Python passes as a sequence of ints, or faster as a buffer of int64: array("q").
template <class T, class Int>
struct NumbersCaster {
  PYBIND11_TYPE_CASTER(std::vector<T>, py::detail::const_name("list[int]"));

  bool load(py::handle source, bool convert) {
    if (!py::isinstance<py::buffer>(source)) {
      py::detail::list_caster<std::vector<T>, T> numbers;
      if (!numbers.load(source, convert)) return false;
      value = std::move(static_cast<std::vector<T>&>(numbers));
      return true;
    }
    const py::buffer_info buffer = py::reinterpret_borrow<py::buffer>(source).request();
    if (buffer.format != "q" || buffer.ndim != 1 || buffer.strides[0] != sizeof(int64_t)) return false;
    const int64_t* const first = static_cast<const int64_t*>(buffer.ptr);
    value.clear();
    value.reserve(buffer.size);
    for (int64_t i = 0; i < buffer.size; ++i) value.push_back(T{static_cast<Int>(first[i])});
    return true;
  }
};

}  // namespace minbert

template <>
struct pybind11::detail::type_caster<minbert::Address> : minbert::IntCaster<minbert::Address, uintptr_t> {};
template <>
struct pybind11::detail::type_caster<minbert::DType> : minbert::IntCaster<minbert::DType, int> {};
template <>
struct pybind11::detail::type_caster<minbert::WeightingRule> : minbert::IntCaster<minbert::WeightingRule, int> {};
template <>
struct pybind11::detail::type_caster<std::vector<minbert::Address>>
    : minbert::NumbersCaster<minbert::Address, uintptr_t> {};
template <>
struct pybind11::detail::type_caster<std::vector<minbert::DType>> : minbert::NumbersCaster<minbert::DType, int> {};
template <>
struct pybind11::detail::type_caster<std::vector<int64_t>> : minbert::NumbersCaster<int64_t, int64_t> {};

namespace minbert {
namespace {

// Instruction sets ----------------------------------------------------------------------------------------------------

constexpr std::pair<const char*, Isa> kIsaNames[] = {
    {"portable", Isa::portable}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"avx512bf16", Isa::avx512bf16}};

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

// Arguments -----------------------------------------------------------------------------------------------------------
// Argument<T>::Python is the type in which a kernel's argument of type T arrives; `native` makes a T of it, or an
// object that converts to T and owns the arrays that T points to.

template <class T>
struct Argument {
  using Python = T;
  static const T& native(const T& value) { return value; }
};

template <class T>
struct Argument<T*> {
  using Python = Address;
  static T* native(Address address) { return address; }
};

template <class T>
struct Pointers {
  std::vector<T*> pointers;

  operator T* const*() const { return pointers.empty() ? nullptr : pointers.data(); }
};
template <class T>
struct Argument<T* const*> {
  using Python = std::vector<Address>;
  static Pointers<T> native(const Python& addresses) { return {{addresses.begin(), addresses.end()}}; }
};

// A record arrives as the tuple of its fields.
template <class Record, class... Field>
struct RecordArgument {
  using Python = std::tuple<Field...>;
  static Record native(const Python& fields) {
    return std::apply([](const auto&... field) { return Record{field...}; }, fields);
  }
};
template <>
struct Argument<Activation> : RecordArgument<Activation, int64_t, int64_t, DType> {};
template <>
struct Argument<EncoderProblem> : RecordArgument<EncoderProblem, DType, int64_t, int64_t, int64_t, int64_t, float,
                                                 Address, int64_t, int64_t, int64_t, bool> {};
template <>
struct Argument<NormalStart>
    : RecordArgument<NormalStart, Address, Address, DType, int64_t, int64_t, float, Address, Address, uint32_t> {};
template <>
struct Argument<Ascent> : RecordArgument<Ascent, Address, Address, Address, Address, DType, Address, int64_t, int64_t,
                                         int64_t, float, float, Address, bool, bool> {};

template <>
struct Argument<WeightingProblem>
    : RecordArgument<WeightingProblem, WeightingRule, int64_t, int64_t, int64_t, Address, Address, Address, Address,
                     Address, Address, Address, double, double> {};

// `seed` points to int64 [2], the seed and the number of the op's first row; `row` is row 0's index in the op. `rows`
// are the rows' indices where they are not consecutive.
Dropout dropout(Address seed, uint32_t threshold, uint32_t stream_id, float scale = 1, int64_t row = 0,
                Address rows = {0}) {
  const int64_t* const pair = seed;
  if (!pair) return {0, 0, stream_id, scale};
  return {pair[0], threshold, stream_id, scale, static_cast<uint32_t>(pair[1]) + static_cast<uint32_t>(row), rows};
}
template <>
struct Argument<Dropout> {
  using Python = std::tuple<Address, uint32_t, uint32_t, float, int64_t, Address>;
  static Dropout native(const Python& fields) { return std::apply(dropout, fields); }
};

template <>
struct Argument<Embeddings> {
  using Python = std::tuple<std::vector<Address>, std::vector<Address>, DType>;  // ids, tables, dtype
  static Embeddings native(const Python& fields) {
    const auto& [ids, tables, dtype] = fields;
    return {{ids[0], ids[1], ids[2]}, {tables[0], tables[1], tables[2]}, dtype};
  }
};

template <>
struct Argument<TaskGradients> {
  using Python = GradientArguments;
  static GradientParts native(const Python& arguments) { return GradientParts(arguments); }
};

// The fields of SurgeryProblem and SurgeryResult.
using SurgeryArguments =
    std::tuple<int64_t, int64_t, Address, Address, Address, Address, double, bool, Address, Address, Address>;
template <class Run>
auto with_surgery(const SurgeryArguments& arguments, const Run& run) {
  const auto& [parts, tasks, gram, orders, given, own_square, max_norm, mean, weights, stats, scratch] = arguments;
  return run({parts, tasks, gram, orders, given, own_square, max_norm, mean}, {weights, stats, scratch});
}

// The addresses of parameters, both moments, averages, copies and low bits (the last three may be empty), the scalars
// of AdamWStep, and the gate.
using UpdateArguments = std::tuple<std::vector<std::vector<Address>>, std::vector<double>, Address, bool>;
template <class Run>
auto with_update(const GradientParts& gradients, const UpdateArguments& arguments, const Run& run) {
  const auto& [addresses, s, flag, is_bool] = arguments;
  const std::vector<Address>& low_bits = addresses[5];
  std::vector<Pointers<void>> tensors;
  for (size_t i = 0; i < addresses.size(); ++i) {
    const auto has_two_bytes = [&](int64_t k) { return i >= 4 || (i == 0 && !low_bits.empty() && low_bits[k].value); };
    tensors.push_back({gradients.parts_of(addresses[i], has_two_bytes)});
  }
  return run(AdamWState{tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]},
             AdamWStep{s[0], s[1], s[2], s[3], s[4], s[5]}, Gate{flag, is_bool});
}

// Calls
// -----------------------------------------------------------------------------------------------------------------

template <class T>
using PythonOf = typename Argument<std::decay_t<T>>::Python;

// A function of a kernel's Python arguments that runs the kernel of the current instruction set.
template <class Result, class... T>
auto call(Result (*Kernels::*kernel)(T...) noexcept) {
  return [kernel](const PythonOf<T>&... argument) {
    return (kernels(current_isa).*kernel)(Argument<std::decay_t<T>>::native(argument)...);
  };
}

#ifdef MINBERT_WITH_CUDA
constexpr bool kWithCuda = true;

void raise_error(const char* op, const char* error) {
  if (error) throw std::runtime_error(std::string(op) + ": CUDA reports: " + error);
}

// A function of a CUDA kernel's Python arguments that launches it, and raises CUDA's error.
template <class... T>
auto launch(const char* op, const char* (*kernel)(T...) noexcept) {
  return
      [=](const PythonOf<T>&... argument) { raise_error(op, kernel(Argument<std::decay_t<T>>::native(argument)...)); };
}
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  module.doc() = "minbert's native kernels; called by the modules of minbert.kernels, which check the arguments";
  module.attr("INTERFACE") = kInterface;
  module.attr("CHUNK") = kChunk;
  module.attr("CHUNK_PARTS") = kChunkParts;
  module.attr("EMBEDDING_ROWS") = kEmbeddingRows;
  module.attr("CUDA") = kWithCuda;

  module.def("isas", &isas, "The instruction sets that this processor runs, narrowest first.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use the kernels of one instruction set, or the widest (\"auto\").");
  module.def("get_isa", &get_isa, "The instruction set whose kernels run.");
  module.def("cpu_features", [] {
    const CpuFeatures found = cpu_features();
    return std::map<std::string, bool>{{"avx2", found.avx2},
                                       {"avx512", found.avx512},
                                       {"avx512_bf16", found.avx512_bf16},
                                       {"amx_bf16", found.amx_bf16}};
  });
  module.def("row_scratch", &row_scratch, "How many floats of scratch memory the row-wise kernels need.");
  module.def("philox", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, int64_t seed) {
    const Words4 words = philox({{c0, c1, c2, c3}}, seed);
    return std::vector<uint32_t>(words.word, words.word + 4);
  });

  module.def("weighting_scratch", &weighting_scratch, "How many numbers of scratch memory task_weights needs.");
  module.def("gram", call(&Kernels::gram), Unlocked());
  module.def("combine", call(&Kernels::combine), Unlocked());
  module.def("task_weights", call(&Kernels::task_weights), Unlocked());
  module.def("smart_init", call(&Kernels::smart_init), Unlocked());
  module.def("smart_ascend", call(&Kernels::smart_ascend), Unlocked());
  module.def("dropout_forward", call(&Kernels::dropout_forward), Unlocked());
  module.def("layer_norm_forward", call(&Kernels::layer_norm_forward), Unlocked());
  module.def("layer_norm_backward", call(&Kernels::layer_norm_backward), Unlocked());
  module.def("sums_of_rows", call(&Kernels::sums_of_rows), Unlocked());
  module.def("gelu_forward", call(&Kernels::gelu_forward), Unlocked());
  module.def("gelu_backward", call(&Kernels::gelu_backward), Unlocked());
  module.def("embedding_forward", call(&Kernels::embedding_forward), Unlocked());
  module.def("embedding_backward", call(&Kernels::embedding_backward), Unlocked());

  module.def("packed_layer_bytes", call(&Kernels::packed_layer_bytes));
  module.def("pack_layer", call(&Kernels::pack_layer), Unlocked());
  module.def("encoder_scratch", call(&Kernels::encoder_scratch));
  module.def("encoder_layers", call(&Kernels::encoder_layers), Unlocked());

  module.def(
      "surgery_weights",
      [](const SurgeryArguments& arguments) { with_surgery(arguments, *kernels(current_isa).surgery_weights); },
      Unlocked());
  module.def(
      "combine_adamw",
      [](const PythonOf<TaskGradients>& g, Address weights, const UpdateArguments& arguments, int threads) {
        const GradientParts gradients(g);
        with_update(gradients, arguments, [&](const auto&... update) {
          kernels(current_isa).combine_adamw(gradients, weights, update..., threads);
        });
      },
      Unlocked());
  module.def(
      "dropout_mask",
      [](Address keep, int64_t rows, int64_t columns, Address seed, uint32_t threshold, uint32_t stream_id,
         int threads) {
        kernels(current_isa).dropout_mask(keep, rows, columns, dropout(seed, threshold, stream_id), threads);
      },
      Unlocked());
  module.def(
      "attention_dropout_mask",
      [](Address keep, Address cu_seqlens, int64_t sequences, int64_t heads, Address seed, uint32_t threshold,
         uint32_t stream_id, int threads) {
        kernels(current_isa)
            .attention_dropout_mask(keep, cu_seqlens, sequences, heads, dropout(seed, threshold, stream_id), threads);
      },
      Unlocked());

  py::class_<AttentionProblem>(module, "AttentionProblem")
      .def(py::init([](DType dtype, Address cu_seqlens, int64_t sequences, int64_t tokens, int64_t max_seqlen,
                       int64_t heads, int64_t head_dim, float scale, Address seed, uint32_t threshold,
                       uint32_t stream_id, float keep_scale) {
        const Dropout of_probabilities = dropout(seed, threshold, stream_id);
        return AttentionProblem{dtype, cu_seqlens, sequences, tokens,           max_seqlen,
                                heads, head_dim,   scale,     of_probabilities, keep_scale};
      }))
      .def("scratch", call(&Kernels::attention_scratch))
      .def("first_token_scratch", [](const AttentionProblem& problem) {
        return first_token_scratch(problem.tokens, problem.sequences, problem.head_dim);
      });
  using Strides = std::vector<int64_t>;
  module.def(
      "first_token_attention",
      [](const AttentionProblem& problem, Address queries, Address keys_values, Address out, Address scratch,
         int threads) {
        return kernels(current_isa).first_token_attention(problem, queries, keys_values, out, scratch, threads);
      },
      Unlocked());
  module.def(
      "first_token_attention_backward",
      [](const AttentionProblem& problem, Address grad_out, Address queries, Address keys_values, Address grad_queries,
         Address grad_keys_values, Address scratch, int threads) {
        return kernels(current_isa)
            .first_token_attention_backward(problem, grad_out, queries, keys_values, grad_queries, grad_keys_values,
                                            scratch, threads);
      },
      Unlocked());
  module.def(
      "attention",
      [](const AttentionProblem& problem, Address qkv, const Strides& strides, Address out, Address keep,
         Address scratch, int threads) {
        return kernels(current_isa)
            .attention(problem, {qkv, strides[0], strides[1], strides[2]}, out, keep, scratch, threads);
      },
      Unlocked());
  module.def(
      "attention_backward",
      [](const AttentionProblem& problem, Address grad_out, const Strides& grad_strides, Address qkv,
         const Strides& strides, Address keep, Address grad_qkv, Address scratch, int threads) {
        return kernels(current_isa)
            .attention_backward(problem, {grad_out, grad_strides[0], grad_strides[1]},
                                {qkv, strides[0], strides[1], strides[2]}, keep, grad_qkv, scratch, threads);
      },
      Unlocked());

#ifdef MINBERT_WITH_CUDA
  module.def("cuda_dropout_mask", launch("dropout_mask", cuda_dropout_mask));
  module.def("cuda_smart_init", launch("smart_init", cuda_smart_init));
  module.def("cuda_smart_ascend", launch("smart_ascend", cuda_smart_ascend));
  module.def("cuda_task_weights", launch("task_weights", cuda_task_weights));
  module.def("cuda_gram", launch("gram", cuda_gram));
  module.def("cuda_combine", launch("combine", cuda_combine));
  module.def("cuda_surgery_weights", [](const SurgeryArguments& arguments, Address stream) {
    with_surgery(arguments, [&](const SurgeryProblem& problem, const SurgeryResult& result) {
      raise_error("surgery_weights", cuda_surgery_weights(problem, result, stream));
    });
  });
  module.def("cuda_combine_adamw",
             [](const PythonOf<TaskGradients>& g, Address weights, const UpdateArguments& arguments, Address stream) {
               const GradientParts gradients(g);
               with_update(gradients, arguments, [&](const auto&... update) {
                 raise_error("combine_adamw_", cuda_combine_adamw(gradients, weights, update..., stream));
               });
             });
#endif
}

}  // namespace minbert
