// Arrays in scratch memory.
#pragma once

#include "cpu/matmul.h"

namespace minbert::MINBERT_ISA {
namespace {

// Allocates aligned arrays from scratch memory; without a base it only counts their bytes.
struct Allocator {
  char* base;
  int64_t used;

  template <class T>
  T* allocate(int64_t count) {
    T* const array = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
};

}  // namespace
}  // namespace minbert::MINBERT_ISA
