// The task gradients as Python passes them, sparse ones among them, as TaskGradients over dense parts of the tensors.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace minbert {

// An address from Python, which converts to a pointer of any type.
struct Address {
  uintptr_t value;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// For K tensors: the addresses of the gradients [T K], 0 for a missing one; sizes [K]; dtypes [K]; T. A tensor with
// sparse gradients is a table, of which each task's gradient has some rows: columns [K], 0 for a tensor with dense
// gradients; the addresses of their sorted row numbers, int64 [T K], and how many there are [T K]; these three are
// empty where all are dense. Last, the first tensor of each of G parts of the model, and K [G + 1]; empty for one part.
using GradientArguments =
    std::tuple<std::vector<Address>, std::vector<int64_t>, std::vector<DType>, int64_t, std::vector<int64_t>,
               std::vector<Address>, std::vector<int64_t>, std::vector<int64_t>>;

// A tensor with dense gradients is one part. A table is cut into its rows that some task has, one part each, and the
// rows between them, which are parts without gradients.
class GradientParts {
 public:
  explicit GradientParts(const GradientArguments& arguments) : tasks_(std::get<3>(arguments)) {
    const auto& [addresses, sizes, dtypes, tasks, columns, ids, counts, first_tensors] = arguments;
    const int64_t tensors = static_cast<int64_t>(sizes.size());
    std::vector<const char*> gradients(tasks);
    const auto begin_model_parts = [this, &firsts = first_tensors](int64_t k) {
      while (first_tensor_.size() < firsts.size() && firsts[first_tensor_.size()] <= k)
        first_tensor_.push_back(static_cast<int64_t>(sizes_.size()));
    };
    for (int64_t k = 0; k < tensors; ++k) {
      begin_model_parts(k);
      for (int64_t t = 0; t < tasks; ++t) gradients[t] = addresses[t * tensors + k];
      if (columns.empty() || columns[k] == 0) {
        add(k, 0, sizes[k], dtypes[k], gradients);
        continue;
      }
      const int64_t rows = sizes[k] / columns[k], row_bytes = columns[k] * width(dtypes[k]);
      std::vector<const int64_t*> next(tasks), end(tasks);
      for (int64_t t = 0; t < tasks; ++t) {
        next[t] = ids[t * tensors + k];
        end[t] = next[t] + counts[t * tensors + k];
      }
      for (int64_t row = 0; row < rows;) {
        int64_t present = rows;  // the next row that some task has
        for (int64_t t = 0; t < tasks; ++t)
          if (next[t] != end[t] && *next[t] < present) present = *next[t];
        std::vector<const char*> of_row(tasks, nullptr);
        if (present > row) add(k, row * columns[k], (present - row) * columns[k], dtypes[k], of_row);
        if (present == rows) break;
        for (int64_t t = 0; t < tasks; ++t)
          if (next[t] != end[t] && *next[t] == present) {
            of_row[t] = gradients[t];
            gradients[t] += row_bytes;
            ++next[t];
          }
        add(k, present * columns[k], columns[k], dtypes[k], of_row);
        row = present + 1;
      }
    }
    begin_model_parts(tensors);
    const int64_t parts = static_cast<int64_t>(sizes_.size());
    data_.resize(tasks * parts);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t t = 0; t < tasks; ++t) data_[t * parts + part] = by_part_[part * tasks + t];
  }

  operator TaskGradients() const {
    TaskGradients g{
        tasks_, static_cast<int64_t>(sizes_.size()), data_.data(), dtypes_.data(), sizes_.data(), first_chunk_.data()};
    if (!first_tensor_.empty()) {
      g.model_parts = static_cast<int64_t>(first_tensor_.size()) - 1;
      g.first_tensor = first_tensor_.data();
    }
    return g;
  }

  // The parts' addresses in other tensors of these shapes: of two bytes where has_two_bytes(k) says so, else of the
  // dtype of the gradients' parameters. No addresses, and a null address, stand for no tensors.
  template <class HasTwoBytes>
  std::vector<void*> parts_of(const std::vector<Address>& tensors, const HasTwoBytes& has_two_bytes) const {
    std::vector<void*> parts;
    for (size_t part = 0; part < sizes_.size() && !tensors.empty(); ++part) {
      char* const tensor = tensors[tensor_[part]];
      const int64_t bytes = has_two_bytes(tensor_[part]) ? 2 : dtypes_[part] == DType::float64 ? 8 : 4;
      parts.push_back(tensor ? tensor + start_[part] * bytes : nullptr);
    }
    return parts;
  }

 private:
  static int64_t width(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

  void add(int64_t tensor, int64_t start, int64_t size, DType dtype, const std::vector<const char*>& gradients) {
    tensor_.push_back(tensor);
    start_.push_back(start);
    sizes_.push_back(size);
    dtypes_.push_back(dtype);
    first_chunk_.push_back(first_chunk_.back() + (size + kChunk - 1) / kChunk);
    by_part_.insert(by_part_.end(), gradients.begin(), gradients.end());
  }

  int64_t tasks_;
  // tensor_ and start_: where a part begins, in elements; first_tensor_: the first part of each part of the model
  std::vector<int64_t> tensor_, start_, sizes_, first_chunk_{0}, first_tensor_;
  std::vector<DType> dtypes_;
  std::vector<const void*> by_part_, data_;  // [parts, T] and [T, parts]
};

}  // namespace minbert
