// The row-wise kernels against plain loops in float64, with scratch memory of exactly the requested size.
#include "check.h"

namespace minbert {
namespace {

using Numbers = std::vector<double>;

Numbers read(Buffer& buffer, int64_t size) {
  Numbers values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = buffer.get(i);
  return values;
}

Buffer filled(int64_t size, DType dtype, int64_t shift, uint64_t salt) {
  Buffer buffer(size, dtype, shift);
  for (int64_t i = 0; i < size; ++i) buffer.set(i, number(i * 16 + salt));
  return buffer;
}

double kept(int64_t i, int64_t columns, const Dropout& dropout) {
  return keeps(dropout, i % columns / 4, i / columns, 0, i % columns % 4) ? dropout.scale : 0;
}

struct Norm {
  double mean, rstd;
};

Norm norm_of(const double* row, int64_t columns, double eps) {
  double mean = 0, square = 0;
  for (int64_t j = 0; j < columns; ++j) mean += row[j] / columns;
  for (int64_t j = 0; j < columns; ++j) square += (row[j] - mean) * (row[j] - mean) / columns;
  return {mean, 1 / std::sqrt(square + eps)};
}

void expect(Buffer& got, const Numbers& wanted, DType dtype, const char* what, Isa isa) {
  const double unit = dtype == DType::bfloat16 ? 8e-3 : 2e-5;
  for (size_t i = 0; i < wanted.size(); ++i)
    CHECK(std::abs(got.get(i) - wanted[i]) <= unit * (1 + std::abs(wanted[i])), "%s: %s[%zu] is %g, expected %g",
          kIsaNames[static_cast<int>(isa)], what, i, got.get(i), wanted[i]);
}

// Layer norm of `total`, then its gradients under d_y: of the total, weight and bias.
struct LayerNorm {
  Numbers y, d_total, d_weight, d_bias;

  LayerNorm(const Numbers& total, const Numbers& weight, const Numbers& bias, const Numbers& d_y, int64_t rows,
            int64_t columns, double eps)
      : y(total.size()), d_total(total.size()), d_weight(columns), d_bias(columns) {
    for (int64_t i = 0; i < rows; ++i) {
      const Norm norm = norm_of(&total[i * columns], columns, eps);
      double mean_g = 0, mean_gx = 0;
      const auto unit = [&](int64_t j) { return (total[i * columns + j] - norm.mean) * norm.rstd; };
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = i * columns + j;
        y[at] = unit(j) * weight[j] + bias[j];
        mean_g += d_y[at] * weight[j] / columns;
        mean_gx += d_y[at] * weight[j] * unit(j) / columns;
        d_weight[j] += d_y[at] * unit(j);
        d_bias[j] += d_y[at];
      }
      for (int64_t j = 0; j < columns; ++j)
        d_total[i * columns + j] = norm.rstd * (d_y[i * columns + j] * weight[j] - mean_g - unit(j) * mean_gx);
    }
  }
};

struct Setting {
  Isa isa;
  Activation a;
  Dropout dropout;
  int64_t shift;
  int threads;
};

void test_layer_norm(const Setting& s) {
  const auto [rows, columns, dtype] = s.a;
  const int64_t size = rows * columns;
  const float eps = 1e-3f;
  Buffer x = filled(size, dtype, s.shift, 0), residual = filled(size, dtype, s.shift, 1);
  Buffer d_y = filled(size, dtype, s.shift, 2);
  Buffer weight = filled(columns, DType::float32, s.shift, 3), bias = filled(columns, DType::float32, s.shift, 4);
  Buffer y(size, dtype, s.shift), d_x(size, dtype, s.shift), d_residual(size, dtype, s.shift);
  Buffer d_weight(columns, DType::float32, s.shift), d_bias(columns, DType::float32, s.shift);
  std::vector<MeanRstd> mean_rstd(rows);
  std::vector<float> scratch(row_scratch(rows, columns));
  const auto w = static_cast<const float*>(weight.data()), b = static_cast<const float*>(bias.data());
  kernels(s.isa).layer_norm_forward(s.a, x.data(), residual.data(), w, b, eps, s.dropout, y.data(), mean_rstd.data(),
                                    scratch.data(), s.threads);
  kernels(s.isa).layer_norm_backward(s.a, d_y.data(), x.data(), residual.data(), w, mean_rstd.data(), s.dropout,
                                     d_x.data(), d_residual.data(), static_cast<float*>(d_weight.data()),
                                     static_cast<float*>(d_bias.data()), scratch.data(), s.threads);
  Numbers total(size), keep(size);
  for (int64_t i = 0; i < size; ++i) {
    keep[i] = s.dropout.threshold ? kept(i, columns, s.dropout) : 1;
    total[i] = residual.get(i) + x.get(i) * keep[i];
  }
  const LayerNorm expected(total, read(weight, columns), read(bias, columns), read(d_y, size), rows, columns, eps);
  expect(y, expected.y, dtype, "layer norm", s.isa);
  expect(d_residual, expected.d_total, dtype, "its gradient", s.isa);
  expect(d_weight, expected.d_weight, DType::float32, "its weight's gradient", s.isa);
  expect(d_bias, expected.d_bias, DType::float32, "its bias' gradient", s.isa);
  if (!s.dropout.threshold) return;
  Numbers of_x(size);
  for (int64_t i = 0; i < size; ++i) of_x[i] = expected.d_total[i] * keep[i];
  expect(d_x, of_x, dtype, "its gradient through dropout", s.isa);
  kernels(s.isa).dropout_forward(s.a, x.data(), y.data(), s.dropout, scratch.data(), s.threads);
  for (int64_t i = 0; i < size; ++i) of_x[i] = x.get(i) * keep[i];
  expect(y, of_x, dtype, "dropout", s.isa);
}

void test_sums_of_rows(const Setting& s) {
  const auto [rows, columns, dtype] = s.a;
  Buffer x = filled(rows * columns, dtype, s.shift, 14), sums(columns, DType::float32, s.shift);
  std::vector<float> scratch(row_scratch(rows, columns));
  kernels(s.isa).sums_of_rows(s.a, x.data(), static_cast<float*>(sums.data()), scratch.data(), s.threads);
  Numbers expected(columns);
  for (int64_t i = 0; i < rows * columns; ++i) expected[i % columns] += x.get(i);
  expect(sums, expected, DType::float32, "sums of rows", s.isa);
}

void test_gelu(const Setting& s) {
  const auto [rows, columns, dtype] = s.a;
  const int64_t size = rows * columns;
  Buffer x = filled(size, dtype, s.shift, 5), d_y = filled(size, dtype, s.shift, 6);
  Buffer bias = filled(columns, DType::float32, s.shift, 7), d_bias(columns, DType::float32, s.shift);
  Buffer y(size, dtype, s.shift), d_x(size, dtype, s.shift);
  std::vector<float> scratch(row_scratch(rows, columns));
  const auto b = static_cast<const float*>(bias.data());
  kernels(s.isa).gelu_forward(s.a, x.data(), b, y.data(), s.threads);
  kernels(s.isa).gelu_backward(s.a, d_y.data(), x.data(), b, d_x.data(), static_cast<float*>(d_bias.data()),
                               scratch.data(), s.threads);
  Numbers value(size), gradient(size), of_bias(columns);
  for (int64_t i = 0; i < size; ++i) {
    const double z = x.get(i) + bias.get(i % columns), below = 0.5 * (1 + std::erf(z / std::sqrt(2.0)));
    value[i] = z * below;
    gradient[i] = d_y.get(i) * (below + z * std::exp(-z * z / 2) / std::sqrt(2 * 3.14159265358979323846));
    of_bias[i % columns] += gradient[i];
  }
  expect(y, value, dtype, "GELU", s.isa);
  expect(d_x, gradient, dtype, "its gradient", s.isa);
  expect(d_bias, of_bias, DType::float32, "its bias' gradient", s.isa);
}

void test_embedding(const Setting& s) {
  const auto [rows, columns, dtype] = s.a;
  const int64_t size = rows * columns, table_rows[] = {11, 2, 70};
  const float eps = 1e-3f;
  std::vector<int64_t> ids[3], gradient_rows[3];
  std::vector<Buffer> tables;
  std::vector<std::vector<float>> d_tables;
  for (int part = 0; part < 3; ++part) {
    for (int64_t i = 0; i < rows; ++i) ids[part].push_back((i * 7 + part) % table_rows[part]);
    gradient_rows[part] = ids[part];
    for (int64_t i = 0; i < rows && part == 0; ++i) gradient_rows[part][i] = table_rows[part] - 1 - ids[part][i];
    tables.push_back(filled(table_rows[part] * columns, DType::float32, s.shift, 8 + part));
    d_tables.emplace_back(table_rows[part] * columns, 0.0f);
  }
  Buffer weight = filled(columns, DType::float32, s.shift, 11), bias = filled(columns, DType::float32, s.shift, 12);
  Buffer d_y = filled(size, dtype, s.shift, 13), y(size, dtype, s.shift);
  std::vector<MeanRstd> mean_rstd(rows);
  std::vector<float> scratch(row_scratch(rows, columns)), d_weight(columns), d_bias(columns);
  std::vector<float> d_total((rows < kEmbeddingRows ? rows : kEmbeddingRows) * columns);
  const Embeddings e{{ids[0].data(), ids[1].data(), ids[2].data()},
                     {tables[0].data(), tables[1].data(), tables[2].data()},
                     DType::float32};
  float* const gradients[] = {d_tables[0].data(), d_tables[1].data(), d_tables[2].data()};
  const auto w = static_cast<const float*>(weight.data()), b = static_cast<const float*>(bias.data());
  kernels(s.isa).embedding_forward(s.a, e, w, b, eps, s.dropout, y.data(), mean_rstd.data(), scratch.data(), s.threads);
  kernels(s.isa).embedding_backward(s.a, e, gradient_rows[0].data(), d_y.data(), w, mean_rstd.data(), s.dropout,
                                    d_total.data(), gradients, d_weight.data(), d_bias.data(), scratch.data(),
                                    s.threads);
  Numbers total(size), keep(size), under_dropout = read(d_y, size);
  for (int64_t i = 0; i < size; ++i) {
    keep[i] = s.dropout.threshold ? kept(i, columns, s.dropout) : 1;
    under_dropout[i] *= keep[i];
    for (int part = 0; part < 3; ++part) total[i] += tables[part].get(ids[part][i / columns] * columns + i % columns);
  }
  LayerNorm expected(total, read(weight, columns), read(bias, columns), under_dropout, rows, columns, eps);
  for (int64_t i = 0; i < size; ++i) expected.y[i] *= keep[i];
  expect(y, expected.y, dtype, "embedding", s.isa);
  for (int part = 0; part < 3; ++part) {
    Numbers wanted(d_tables[part].size());
    for (int64_t i = 0; i < size; ++i)
      wanted[gradient_rows[part][i / columns] * columns + i % columns] += expected.d_total[i];
    for (size_t i = 0; i < wanted.size(); ++i)
      CHECK(std::abs(d_tables[part][i] - wanted[i]) <= 1e-4 * (1 + std::abs(wanted[i])), "%s: table %d has %g, not %g",
            kIsaNames[static_cast<int>(s.isa)], part, d_tables[part][i], wanted[i]);
  }
}

}  // namespace

void test_rowwise(Isa isa) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const int64_t rows : {1, 33, 70})
      for (const int64_t columns : {3, 32, 101})
        for (const uint32_t threshold : {0u, 1u << 30})
          for (const int threads : kThreadCounts) {
            const uint32_t first_row = static_cast<uint32_t>(-rows / 2);  // among them, numbers begin again at 0
            const Dropout dropout{-77, threshold, 5, threshold ? 4.0f / 3 : 1.0f, first_row};
            const Setting setting{isa, {rows, columns, dtype}, dropout, columns % 2 ? 3 : 0, threads};
            test_layer_norm(setting);
            test_sums_of_rows(setting);
            test_gelu(setting);
            test_embedding(setting);
          }
}

}  // namespace minbert
