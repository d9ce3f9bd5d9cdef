// Eigenvalues and quadratic programs of random and degenerate Gram matrices.
#include "random_gradients.h"

namespace minbert {
namespace {

void test_eigenvalues(int64_t n, const Matrix& a) {
  Matrix memory(spectrum_numbers(n));
  Scratch scratch{memory.data()};
  const Spectrum of = eigenvalues(a.data(), n, scratch);
  const double unit = 40 * static_cast<double>(n) * kEps;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double entry = 0, inner = 0;
      for (int64_t k = 0; k < n; ++k) {
        entry += of.values[k] * of.vectors[k * n + i] * of.vectors[k * n + j];
        inner += of.vectors[i * n + k] * of.vectors[j * n + k];
      }
      CHECK(std::abs(entry - a[i * n + j]) <= unit * trace(a, n), "entry %g, expected %g", entry, a[i * n + j]);
      CHECK(std::abs(inner - (i == j)) <= unit, "eigenvectors have an inner product of %g", inner);
    }
}

void test_quadratic_program(int64_t n, const Matrix& gram, bool scaled) {
  Matrix a(n * n), direction(n), b(n), x(n, NAN), memory(quadratic_program_numbers(n), NAN);
  for (int64_t i = 0; i < n * n; ++i) a[i] = gram[i] / trace(gram, n);
  for (auto& entry : direction) entry = below(2) ? normal() : 0;
  for (const bool simplex : {false, true}) {
    b = product(a, direction);
    const QuadraticProgram program{n, a.data(), b.data(), simplex};
    minimise(program, x.data(), {memory.data()});
    check_optimal(program, x.data(), scaled);
  }
}

}  // namespace

void test_quadratic_programs() {
  for (int64_t n = 1; n <= 16; ++n)
    for (const int64_t dimensions : {int64_t{1}, int64_t{2}, n / 2 + 1, n, 2 * n})
      for (int kind = 0; kind <= 5; ++kind) {
        const Matrix gram = gram_of(n, dimensions, kind);
        if (trace(gram, n) == 0) continue;
        test_eigenvalues(n, gram);
        test_quadratic_program(n, gram, kind == 1 || kind == 5);
      }
}

}  // namespace minbert
