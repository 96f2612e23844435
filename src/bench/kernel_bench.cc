#include "bench/kernel_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "base/aligned.h"
#include "base/half.h"
#include "base/philox.h"
#include "bench/measure.h"
#include "bench/peaks.h"
#include "format/code_matrix.h"
#include "kernels/kernels.h"

namespace zipcache::bench {
namespace {

// Matrices that one measurement walks through: beyond any last-level cache, or one of them.
constexpr std::size_t kColdBytes = std::size_t{128} << 20;
constexpr std::size_t kWarmCalls = 64;

// Scores have tokens as lanes and sum over channels, values the other way round.
struct Shape {
  const char* half;
  std::uint32_t lanes, inner;
};

std::size_t matrix_bytes(int bits, const Shape& shape) {
  return bits == 16 ? std::size_t{shape.lanes} * shape.inner * sizeof(Half)
                    : format::matrix_bytes(bits, shape.lanes, shape.inner);
}

// Random bytes are random codes; as fp16 the exponent is kept in a harmless range.
AlignedVector<std::byte> random_matrices(int bits, std::size_t bytes) {
  AlignedVector<std::byte> data(bytes);
  Philox random(1, static_cast<std::uint32_t>(bits), 0);
  for (std::size_t i = 0; i + 4 <= bytes; i += 4) {
    std::uint32_t word = random.next();
    if (bits == 16) {
      word = (word & 0x83ff83ffu) | 0x3c003c00u;  // 1 to 2, both signs
    }
    std::copy_n(reinterpret_cast<const std::byte*>(&word), sizeof word, data.data() + i);
  }
  return data;
}

class KernelBench {
 public:
  KernelBench(const KernelOptions& options, const Records& records)
      : options_(options), records_(records) {}

  Status measure(const std::vector<const kernels::KernelTable*>& tables, int bits,
                 const Shape& shape, std::uint32_t n_rows) {
    const std::size_t bytes = round_up(matrix_bytes(bits, shape), kAlignmentBytes);
    const std::size_t n_matrices =
        options_.is_warm ? 1 : std::max<std::size_t>(1, kColdBytes / bytes);
    const std::size_t n_calls = options_.is_warm ? kWarmCalls : n_matrices;
    const AlignedVector<std::byte> data = random_matrices(bits, bytes * n_matrices);

    const std::size_t x_stride = round_up(shape.inner, 32);
    const std::size_t y_stride = round_up(shape.lanes, 16);
    AlignedVector<float> x(x_stride * n_rows), y(y_stride * n_rows);
    Philox random(2, 0, 0);
    for (std::uint32_t row = 0; row < n_rows; ++row) {
      for (std::uint32_t i = 0; i < shape.inner; ++i) {
        x[row * x_stride + i] = static_cast<float>(random.next()) * 0x1p-31f - 1.0f;
      }
    }
    AlignedVector<std::byte> scratch(kernels::matmul_scratch_bytes(n_rows, shape.inner));

    std::vector<std::vector<double>> seconds(tables.size());
    for (std::uint32_t round = 0; round <= options_.rounds; ++round) {  // round 0 warms up
      for (std::size_t table = 0; table < tables.size(); ++table) {
        const double taken = seconds_of([&] {
          for (std::size_t call = 0; call < n_calls; ++call) {
            const kernels::MatrixView view = {data.data() + call % n_matrices * bytes, bits,
                                              shape.lanes, shape.inner, shape.lanes};
            tables[table]->matmul(view, x.data(), x_stride, n_rows, y.data(), y_stride,
                                  {scratch.data(), scratch.size()});
          }
        });
        if (round > 0) {
          seconds[table].push_back(taken / static_cast<double>(n_calls));
        }
      }
    }
    for (std::size_t table = 0; table < tables.size(); ++table) {
      if (Status added = record(tables[table]->isa, bits, shape, n_rows, seconds[table]); !added) {
        return added;
      }
    }
    return ok_status();
  }

 private:
  const Peaks& peaks(const std::string& isa) {
    const auto found = peaks_.find(isa);
    return found != peaks_.end() ? found->second
                                 : peaks_.emplace(isa, measure_peaks(isa, 1)).first->second;
  }

  Status record(const std::string& isa, int bits, const Shape& shape, std::uint32_t n_rows,
                const std::vector<double>& seconds) {
    const double middle = median(seconds);
    const std::size_t bytes = matrix_bytes(bits, shape);
    const double read = static_cast<double>(bytes) / middle;
    const double flops = 2.0 * n_rows * shape.lanes * shape.inner / middle;
    const Peaks& peak = peaks(isa);
    const double read_share = options_.is_warm ? 0.0 : read / peak.read_bytes_per_s;
    const double flops_share =
        flops / (bits == 16 || isa == "scalar" ? peak.fma_flops_per_s : peak.dot_flops_per_s);
    fmt::print(
        "{:<6} {:>2} bits {:>3} x {:<3} {:>2} rows {:<8}: {:8.2f} us ± {:.2f}  {:5.1f} GB/s "
        "{:3.0f} %  "
        "{:4.0f} GFLOP/s {:3.0f} %\n",
        shape.half, bits, shape.lanes, shape.inner, n_rows, isa, middle * 1e6,
        spread(seconds) * 1e6, read / 1e9, 100 * read_share, flops / 1e9, 100 * flops_share);
    std::fflush(stdout);
    return records_.add({{"bench", "kernels"},
                         {"half", shape.half},
                         {"bits", bits},
                         {"lanes", shape.lanes},
                         {"inner", shape.inner},
                         {"rows", n_rows},
                         {"warm", options_.is_warm},
                         {"seconds", middle},
                         {"spread", spread(seconds)},
                         {"bytes", bytes},
                         {"bytes_per_s", read},
                         {"peak_bytes_per_s", peak.read_bytes_per_s},
                         {"flops_per_s", flops},
                         {"peak_flops_per_s", peak.fma_flops_per_s},
                         {"peak_dot_flops_per_s", peak.dot_flops_per_s},
                         {"binds", read_share > flops_share ? "memory" : "compute"},
                         {"device", isa},
                         {"threads", 1}});
  }

  const KernelOptions& options_;
  std::map<std::string, Peaks> peaks_;
  const Records& records_;
};

}  // namespace

Status bench_kernels(const KernelOptions& options, const Records& records) {
  std::vector<const kernels::KernelTable*> tables;
  if (options.isas.empty()) {
    for (const char* isa : {"avx512", "avxvnni", "avx2", "scalar"}) {
      if (const Expected<const kernels::KernelTable*> table = kernels::select_kernels(isa)) {
        tables.push_back(*table);
      }
    }
  }
  for (const std::string& isa : options.isas) {
    const Expected<const kernels::KernelTable*> table = kernels::select_kernels(isa);
    if (!table) {
      return table.error();
    }
    tables.push_back(*table);
  }
  for (const int bits : options.widths) {
    if (bits != 16 && !format::is_code_width(bits)) {
      return invalid_argument(
          fmt::format("width {} found; there are 2, 3, 4, 8 and 16 bits", bits));
    }
  }
  KernelBench bench(options, records);
  for (const std::uint32_t dim : options.dims) {
    for (const Shape& shape :
         {Shape{"scores", options.n_tokens, dim}, Shape{"values", dim, options.n_tokens}}) {
      for (const int bits : options.widths) {
        for (const std::uint32_t n_rows : options.rows) {
          if (Status done = bench.measure(tables, bits, shape, n_rows); !done) {
            return done;
          }
        }
      }
    }
  }
  return ok_status();
}

}  // namespace zipcache::bench
