// Sums over the rows of an activation: the gradient of a bias.
#include "cpu/rowwise.h"

namespace minbert::MINBERT_ISA {

void sums_of_rows(Activation a, const void* x, float* sums, float* scratch, int threads) noexcept {
  with_activation(a.dtype, [&](auto element) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a), [&](int64_t chunk, int64_t begin, int64_t end) {
      float* const to = scratch_of(scratch, chunk, a.columns).sums[0];
      std::memset(to, 0, padded(a.columns) * sizeof(float));
      for (int64_t row = begin; row < end; ++row) {
        const Element* const from = static_cast<const Element*>(x) + row * a.columns;
        along_row(a.columns, [=](int64_t at, int, int64_t count) {
          store_raw(to + at, load<Floats>(to + at) + load_first(from + at, count));
        });
      }
    });
  });
  add_chunks<1>(threads, a.rows, a.columns, scratch, {sums});
}

}  // namespace minbert::MINBERT_ISA
