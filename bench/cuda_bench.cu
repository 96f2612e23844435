// Decode attention over packed pages, packing and the saliency probe on a GPU, beside a read-only
// and a copy kernel in the same run.  Usage: cuda_bench [--quick] [--filter PART | --filter =NAME]
// [--json FILE]
//
// Cold: each launch of a graph reads another copy of the cache, and the copies exceed the L2 many
// times. Codes and parameters are random. Every shape is checked against the formula in double (two
// rows of it) before it is timed. Times are per launch: the median over graph replays, with the
// 10th and 90th percentile.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "base/half.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/host_page.h"
#include "kernels/cuda/plan.h"

namespace zipcache::cuda {
namespace {

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
  }
}
#define REQUIRE(call) require((call), #call)

void require_ok(const Status& status) {
  if (!status) {
    std::fprintf(stderr, "%s\n", status.error().message.c_str());
    std::exit(1);
  }
}

template <typename T>
T* device_alloc(std::size_t n) {
  void* p = nullptr;
  REQUIRE(cudaMalloc(&p, std::max<std::size_t>(n, 1) * sizeof(T)));
  return static_cast<T*>(p);
}
template <typename T>
T* device_copy(const std::vector<T>& from) {
  T* p = device_alloc<T>(from.size());
  REQUIRE(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// --- Random contents -----------------------------------------------------------------------------

__device__ HalfBits device_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

__host__ __device__ uint32_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}
__host__ __device__ float unit_float(uint64_t x) { return (mix(x) >> 8) * 0x1p-24f; }

__global__ void fill_random(uint32_t* words, std::size_t n, uint64_t seed) {
  for (std::size_t at = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; at < n;
       at += std::size_t{gridDim.x} * blockDim.x) {
    words[at] = mix(at + seed * 0x9e3779b97f4a7c15ull);
  }
}

// About normal fp16 numbers.
__global__ void fill_normal(HalfBits* halves, std::size_t n, uint64_t seed) {
  for (std::size_t at = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; at < n;
       at += std::size_t{gridDim.x} * blockDim.x) {
    const uint64_t x = (at + seed * 0x9e3779b97f4a7c15ull) * 4;
    const float sum = unit_float(x) + unit_float(x + 1) + unit_float(x + 2) + unit_float(x + 3);
    halves[at] = device_half((sum - 2.0f) * 1.732f);
  }
}

// Token scales in (1, 8) and zeros inside the code range, for every tile of the pages.
struct PageClasses {
  int head_dim;
  PageClass classes[kMaxClasses];
};
__global__ void fill_params(uint8_t* pool, const PageEntry* pages, PageClasses p) {
  const int page = blockIdx.x;
  const PageEntry entry = pages[page];
  const PageClass cls = p.classes[entry.cls];
  const int token = threadIdx.x;
  HalfBits* params = reinterpret_cast<HalfBits*>(
      pool + std::size_t{entry.unit} * kTileAlignment +
      token / kTileTokens * tile_bytes(p.head_dim, cls.key_bits, cls.value_bits) +
      tile_param_offset(p.head_dim, cls.key_bits, cls.value_bits));
  const float levels = (1 << cls.value_bits) - 1;
  const uint64_t x = page * 64ull + token;
  params[scale_index(token % kTileTokens)] =
      device_half((1.0f + 5.0f * unit_float(2 * x)) * 3.0f / levels);
  params[zero_index(token % kTileTokens)] =
      device_half(levels * (0.3f + 0.4f * unit_float(2 * x + 1)));
}

// --- Ceilings ------------------------------------------------------------------------------------

constexpr int kStreamThreads = 512, kStreamUnroll = 8;

__global__ void __launch_bounds__(kStreamThreads)
    read_kernel(const uint4* from, std::size_t n, uint32_t* sink) {
  uint32_t sum = 0;
  const std::size_t stride = std::size_t{gridDim.x} * kStreamThreads;
  std::size_t at = blockIdx.x * std::size_t{kStreamThreads} + threadIdx.x;
  for (; at + (kStreamUnroll - 1) * stride < n; at += kStreamUnroll * stride) {
    uint4 v[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      v[u] = __ldcs(from + at + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      sum += v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
  }
  for (; at < n; at += stride) {
    const uint4 v = __ldcs(from + at);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678u) {
    *sink = sum;
  }
}
__global__ void __launch_bounds__(kStreamThreads)
    copy_kernel(const uint4* from, uint4* to, std::size_t n) {
  const std::size_t stride = std::size_t{gridDim.x} * kStreamThreads;
  std::size_t at = blockIdx.x * std::size_t{kStreamThreads} + threadIdx.x;
  for (; at + (kStreamUnroll - 1) * stride < n; at += kStreamUnroll * stride) {
    uint4 v[kStreamUnroll];
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      v[u] = __ldcs(from + at + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kStreamUnroll; ++u) {
      __stcs(to + at + u * stride, v[u]);
    }
  }
}

// --- Timing --------------------------------------------------------------------------------------

struct Timing {
  double median = 0, p10 = 0, p90 = 0;  // seconds per launch
};

// Captures launch(0..n_launches-1) into a graph and replays it.
Timing time_graph(int n_launches, int n_samples,
                  const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  REQUIRE(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int n = 0; n < n_launches; ++n) {
    launch(n, stream);
  }
  REQUIRE(cudaStreamEndCapture(stream, &graph));
  REQUIRE(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  REQUIRE(cudaEventCreate(&begin));
  REQUIRE(cudaEventCreate(&end));
  std::vector<double> times;
  for (int sample = -3; sample < n_samples; ++sample) {
    REQUIRE(cudaEventRecord(begin, stream));
    REQUIRE(cudaGraphLaunch(exec, stream));
    REQUIRE(cudaEventRecord(end, stream));
    REQUIRE(cudaEventSynchronize(end));
    float ms = 0;
    REQUIRE(cudaEventElapsedTime(&ms, begin, end));
    if (sample >= 0) {
      times.push_back(ms * 1e-3 / n_launches);
    }
  }
  std::ranges::sort(times);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return {times[times.size() / 2], times[times.size() / 10], times[times.size() * 9 / 10]};
}

struct Report {
  std::FILE* json = nullptr;
  std::string device;
  double read_bytes_per_s = 0, copy_bytes_per_s = 0;

  void line(const char* bench, const std::string& shape, double bytes, const Timing& t,
            const std::string& extra = "") const {
    const double rate = bytes / t.median;
    std::printf("%-10s %-34s %9.2f us [%7.2f %7.2f] %8.1f MB %7.0f GB/s %5.1f%% of read %s\n",
                bench, shape.c_str(), t.median * 1e6, t.p10 * 1e6, t.p90 * 1e6, bytes * 1e-6,
                rate * 1e-9, read_bytes_per_s > 0 ? 100 * rate / read_bytes_per_s : 100.0,
                extra.c_str());
    std::fflush(stdout);
    if (json != nullptr) {
      std::fprintf(json,
                   "{\"bench\":\"%s\",\"shape\":\"%s\",\"seconds\":%.4g,\"seconds_p10\":%.4g,"
                   "\"seconds_p90\":%.4g,\"bytes\":%.0f,\"bytes_per_s\":%.5g,"
                   "\"read_bytes_per_s\":%.5g,\"copy_bytes_per_s\":%.5g,\"of_read\":%.4f,"
                   "\"device\":\"%s\"}\n",
                   bench, shape.c_str(), t.median, t.p10, t.p90, bytes, rate, read_bytes_per_s,
                   copy_bytes_per_s, read_bytes_per_s > 0 ? rate / read_bytes_per_s : 1.0,
                   device.c_str());
      std::fflush(json);
    }
  }
};

void bench_ceilings(Report& report, int n_samples) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  uint8_t* buffer = device_alloc<uint8_t>(4 * kBytes);
  fill_random<<<1024, 256>>>(reinterpret_cast<uint32_t*>(buffer), kBytes, 1);
  uint32_t* sink = device_alloc<uint32_t>(1);
  int n_sms = 0;
  cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, 0);
  Timing best;
  for (const int blocks_per_sm : {2, 4}) {
    const Timing t = time_graph(4, n_samples, [&](int n, cudaStream_t stream) {
      read_kernel<<<n_sms * blocks_per_sm, kStreamThreads, 0, stream>>>(
          reinterpret_cast<const uint4*>(buffer + n * kBytes), kBytes / 16, sink);
    });
    if (best.median == 0 || t.median < best.median) {
      best = t;
    }
  }
  report.read_bytes_per_s = kBytes / best.median;
  const Timing copy = time_graph(2, n_samples, [&](int n, cudaStream_t stream) {
    copy_kernel<<<n_sms * 4, kStreamThreads, 0, stream>>>(
        reinterpret_cast<const uint4*>(buffer + 2 * n * kBytes),
        reinterpret_cast<uint4*>(buffer + (2 * n + 1) * kBytes), kBytes / 16);
  });
  report.copy_bytes_per_s = 2 * kBytes / copy.median;
  report.line("read", "1 GiB", kBytes, best);
  report.line("copy", "1 GiB", 2.0 * kBytes, copy);
  // The same for what one launch of a small cache reads: what starting and ending a kernel costs.
  for (const std::size_t mib : {28, 112, 224}) {
    const std::size_t bytes = mib << 20;
    const int n = static_cast<int>(4 * kBytes / bytes);
    const Timing t = time_graph(n, n_samples, [&](int at, cudaStream_t stream) {
      read_kernel<<<n_sms * 2, kStreamThreads, 0, stream>>>(
          reinterpret_cast<const uint4*>(buffer + at * bytes), bytes / 16, sink);
    });
    report.line("read", std::to_string(mib) + " MiB", bytes, t);
  }
  cudaFree(buffer);
  cudaFree(sink);
}

// --- Decode --------------------------------------------------------------------------------------

struct Shape {
  std::string name;
  int batch = 1, tokens = 0;
  std::vector<PageClass> classes;
  std::vector<double> share;  // of the tokens, per class
  int tail = 0;
  int n_heads = 32, n_kv_heads = 8, head_dim = 128;
};

// Attention of one query head over a row's pages, in double, straight from the page bytes.
double check_row(const Shape& shape, const std::vector<std::byte>& pool,
                 const std::vector<PageEntry>& pages, int begin, int end,
                 const std::vector<HalfBits>& sets, int set_base, const float* factors,
                 const HalfBits* q, const HalfBits* tail_k, const HalfBits* tail_v,
                 const float* got) {
  const int d = shape.head_dim;
  const double scale = 1 / std::sqrt(double(d));
  std::vector<double> scores, sum(d);
  std::vector<double> values;
  for (int at = begin; at < end; ++at) {
    const PageEntry e = pages[at];
    const PageClass cls = shape.classes[e.cls];
    const HostPage page({const_cast<std::byte*>(&pool[std::size_t{e.unit} * kTileAlignment]),
                         std::size_t(page_bytes(d, cls.key_bits, cls.value_bits))},
                        d, cls);
    const HalfBits* set = &sets[std::size_t(set_base + e.set) * 2 * d];
    for (int token = 0; token < e.tokens; ++token) {
      double dot = 0;
      for (int c = 0; c < d; ++c) {
        dot +=
            double{half_to_float(q[c])} *
            (double{half_to_float(set[c])} * page.key_code(token, c) + half_to_float(set[d + c]));
        values.push_back(double{factors[c]} * half_to_float(page.scale(token)) *
                         (page.value_code(token, c) - half_to_float(page.zero(token))));
      }
      scores.push_back(dot * scale);
    }
  }
  for (int token = 0; token < shape.tail; ++token) {
    double dot = 0;
    for (int c = 0; c < d; ++c) {
      dot += double{half_to_float(q[c])} * half_to_float(tail_k[token * d + c]);
      values.push_back(half_to_float(tail_v[token * d + c]));
    }
    scores.push_back(dot * scale);
  }
  const double max = *std::ranges::max_element(scores);
  double total = 0;
  for (std::size_t token = 0; token < scores.size(); ++token) {
    const double p = std::exp(scores[token] - max);
    total += p;
    for (int c = 0; c < d; ++c) {
      sum[c] += p * values[token * d + c];
    }
  }
  double error = 0, size = 0;
  for (int c = 0; c < d; ++c) {
    error += std::pow(got[c] - sum[c] / total, 2);
    size += std::pow(sum[c] / total, 2);
  }
  return std::sqrt(error / size);
}

void bench_decode(const Report& report, const Shape& shape, int n_samples) {
  const int n_rows = shape.batch * shape.n_kv_heads, d = shape.head_dim;
  DecodeParams p;
  p.n_sequences = shape.batch;
  p.n_kv_heads = shape.n_kv_heads;
  p.n_heads = shape.n_heads;
  p.head_dim = d;
  p.scale = 1 / std::sqrt(float(d));
  const int n_classes = int(shape.classes.size());

  // Pages of all rows, row after row.
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0}, set_base;
  uint32_t unit = 0;
  for (int row = 0; row < n_rows; ++row) {
    int left = shape.tokens;
    for (int cls = 0; cls < n_classes; ++cls) {
      const int n = cls + 1 == n_classes ? left : int(shape.tokens * shape.share[cls] + 0.5);
      left -= n;
      for (int first = 0; first < n; first += kPageTokens) {
        PageEntry e;
        e.unit = unit;
        e.set = uint16_t(cls);
        e.tokens = uint8_t(std::min(n - first, kPageTokens));
        e.cls = uint8_t(cls);
        pages.push_back(e);
        unit += page_bytes(d, shape.classes[cls].key_bits, shape.classes[cls].value_bits) /
                kTileAlignment;
      }
    }
    row_begin.push_back(int(pages.size()));
    set_base.push_back(row * n_classes);
  }
  const std::size_t pool_bytes = std::size_t{unit} * kTileAlignment;
  const int n_copies = int(std::clamp<std::size_t>((std::size_t{1} << 30) / pool_bytes, 3, 64));
  uint8_t* pools = device_alloc<uint8_t>(pool_bytes * n_copies);
  p.pages = device_copy(pages);
  fill_random<<<2048, 256>>>(reinterpret_cast<uint32_t*>(pools), pool_bytes * n_copies / 4, 7);
  PageClasses classes{d, {}};
  std::ranges::copy(shape.classes, classes.classes);
  for (int copy = 0; copy < n_copies; ++copy) {
    fill_params<<<int(pages.size()), 64>>>(pools + copy * pool_bytes, p.pages, classes);
  }

  std::vector<HalfBits> sets;
  for (int row = 0; row < n_rows; ++row) {
    for (int cls = 0; cls < n_classes; ++cls) {
      const float levels = float((1 << shape.classes[cls].key_bits) - 1);
      std::vector<float> low(d), step(d);
      for (int c = 0; c < d; ++c) {
        const uint64_t x = (uint64_t(row) * n_classes + cls) * d + c;
        const float range = 2 + 4 * unit_float(3 * x);
        step[c] = range / levels;
        low[c] = -range * (0.3f + 0.4f * unit_float(3 * x + 1));
      }
      for (const float s : step) sets.push_back(float_to_half(s));
      for (const float m : low) sets.push_back(float_to_half(m));
    }
  }
  p.key_sets = device_copy(sets);
  std::vector<float> factors(std::size_t(n_rows) * d);
  for (std::size_t at = 0; at < factors.size(); ++at) {
    factors[at] = 0.05f + 0.1f * unit_float(at + 12345);
  }
  p.value_factors = device_copy(factors);
  const std::size_t q_size = std::size_t(shape.batch) * shape.n_heads * d;
  HalfBits* q = device_alloc<HalfBits>(q_size);
  fill_normal<<<256, 256>>>(q, q_size, 3);
  p.q = q;
  p.out = device_alloc<float>(q_size);
  const std::size_t tail_size = std::size_t(n_rows) * kTailTokens * d;
  HalfBits *tail_k = nullptr, *tail_v = nullptr;
  if (shape.tail > 0) {
    tail_k = device_alloc<HalfBits>(tail_size * n_copies);
    tail_v = device_alloc<HalfBits>(tail_size * n_copies);
    fill_normal<<<1024, 256>>>(tail_k, tail_size * n_copies, 4);
    fill_normal<<<1024, 256>>>(tail_v, tail_size * n_copies, 5);
    p.tail_tokens = device_copy(std::vector<std::int32_t>(shape.batch, shape.tail));
  }

  const auto setup = prepare_decode(d, shape.n_heads / shape.n_kv_heads, shape.classes);
  if (!setup) {
    std::fprintf(stderr, "%s\n", setup.error().message.c_str());
    std::exit(1);
  }
  PlanInput input;
  input.head_dim = d;
  input.classes = shape.classes;
  input.pages = pages;
  input.row_begin = row_begin;
  input.set_base = set_base;
  input.with_tail = shape.tail > 0;
  input.tail_tokens = shape.tail;
  input.resident_blocks = setup->resident_blocks;
  const DecodePlan plan = plan_decode(input);
  p.items = device_copy(plan.items);
  p.n_blocks = plan.n_blocks;
  p.partials = device_alloc<float>(std::size_t(plan.n_partials) *
                                   partial_floats(d, shape.n_heads / shape.n_kv_heads));
  p.tickets = device_alloc<std::uint32_t>(n_rows);
  REQUIRE(cudaMemset(p.tickets, 0, n_rows * sizeof(std::uint32_t)));

  const auto launch = [&](int copy, cudaStream_t stream) {
    DecodeParams at = p;
    at.pool = pools + copy * pool_bytes;
    if (shape.tail > 0) {
      at.tail_k = tail_k + copy * tail_size;
      at.tail_v = tail_v + copy * tail_size;
    }
    require_ok(decode(at, *setup, stream));
  };

  // The first and the last row of the first copy.
  launch(0, nullptr);
  std::vector<float> out(q_size);
  std::vector<HalfBits> host_q(q_size), host_k(tail_size), host_v(tail_size);
  std::vector<std::byte> pool(pool_bytes);
  REQUIRE(cudaMemcpy(out.data(), p.out, q_size * 4, cudaMemcpyDeviceToHost));
  REQUIRE(cudaMemcpy(host_q.data(), q, q_size * 2, cudaMemcpyDeviceToHost));
  REQUIRE(cudaMemcpy(pool.data(), pools, pool_bytes, cudaMemcpyDeviceToHost));
  if (shape.tail > 0) {
    REQUIRE(cudaMemcpy(host_k.data(), tail_k, tail_size * 2, cudaMemcpyDeviceToHost));
    REQUIRE(cudaMemcpy(host_v.data(), tail_v, tail_size * 2, cudaMemcpyDeviceToHost));
  }
  double worst = 0;
  for (const int row : {0, n_rows - 1}) {
    const int group = shape.n_heads / shape.n_kv_heads;
    const std::size_t head = std::size_t(row / shape.n_kv_heads) * shape.n_heads +
                             std::size_t(row % shape.n_kv_heads) * group + group - 1;
    worst =
        std::max(worst, check_row(shape, pool, pages, row_begin[row], row_begin[row + 1], sets,
                                  set_base[row], &factors[std::size_t(row) * d], &host_q[head * d],
                                  &host_k[std::size_t(row) * kTailTokens * d],
                                  &host_v[std::size_t(row) * kTailTokens * d], &out[head * d]));
  }
  if (!(worst < 5e-3)) {
    std::fprintf(stderr, "%s: wrong, relative error %g\n", shape.name.c_str(), worst);
    std::exit(1);
  }

  const Timing t = time_graph(n_copies, n_samples, launch);
  const double bytes = double(pool_bytes) + double(sets.size()) * 2 + factors.size() * 4.0 +
                       q_size * 6.0 + double(n_rows) * shape.tail * d * 4;
  char extra[160];
  std::snprintf(extra, sizeof(extra), "err %.1e blocks %d parts %d slots %d", worst, p.n_blocks,
                plan.n_partials, setup->shared.n_slots);
  report.line("decode", shape.name, bytes, t, extra);
  for (const void* memory :
       {static_cast<const void*>(pools), static_cast<const void*>(p.pages),
        static_cast<const void*>(p.key_sets), static_cast<const void*>(p.value_factors),
        static_cast<const void*>(q), static_cast<const void*>(p.out),
        static_cast<const void*>(tail_k), static_cast<const void*>(tail_v),
        static_cast<const void*>(p.tail_tokens), static_cast<const void*>(p.items),
        static_cast<const void*>(p.partials), static_cast<const void*>(p.tickets)}) {
    cudaFree(const_cast<void*>(memory));
  }
}

// --- Prefill side --------------------------------------------------------------------------------

void bench_prefill(const Report& report, int n_tokens, int n_probes, int n_samples) {
  const int n_heads = 32, n_kv_heads = 8, d = 128, n_copies = 3;
  const std::size_t size = std::size_t(n_tokens) * n_kv_heads * d;
  HalfBits* k = device_alloc<HalfBits>(size * n_copies);
  HalfBits* v = device_alloc<HalfBits>(size * n_copies);
  fill_normal<<<2048, 256>>>(k, size * n_copies, 8);
  fill_normal<<<2048, 256>>>(v, size * n_copies, 9);

  PackParams p;
  p.n_tokens = n_tokens;
  p.n_kv_heads = n_kv_heads;
  p.head_dim = d;
  p.token_stride = n_kv_heads * d;
  p.n_classes = p.n_key_sets = 2;
  p.classes[0] = {4, 4};
  p.classes[1] = {2, 2};
  p.class_tokens[0] = n_tokens * 6 / 10;
  p.class_tokens[1] = n_tokens - p.class_tokens[0];
  p.key_set[1] = 1;
  p.key_clip[0] = p.key_clip[1] = p.value_clip[0] = p.value_clip[1] = 1;
  std::vector<PageEntry> pages;
  uint32_t unit = 0;
  for (int head = 0; head < n_kv_heads; ++head) {
    for (int cls = 0; cls < 2; ++cls) {
      for (int first = 0; first < p.class_tokens[cls]; first += kPageTokens) {
        PageEntry e;
        e.unit = unit;
        e.cls = uint8_t(cls);
        e.set = uint16_t(cls);
        e.tokens = uint8_t(std::min(p.class_tokens[cls] - first, kPageTokens));
        pages.push_back(e);
        unit += page_bytes(d, p.classes[cls].key_bits, p.classes[cls].value_bits) / kTileAlignment;
      }
    }
  }
  // A random split of the tokens, in order inside each class, as ranking leaves it.
  std::vector<std::int32_t> order;
  for (int head = 0; head < n_kv_heads; ++head) {
    std::vector<std::pair<uint32_t, int>> keys(n_tokens);
    for (int token = 0; token < n_tokens; ++token) {
      keys[token] = {mix(uint64_t(head) * n_tokens + token + 77), token};
    }
    std::ranges::sort(keys);
    std::vector<std::int32_t> of_head(n_tokens);
    for (int at = 0; at < n_tokens; ++at) {
      of_head[at] = keys[at].second;
    }
    std::sort(of_head.begin(), of_head.begin() + p.class_tokens[0]);
    std::sort(of_head.begin() + p.class_tokens[0], of_head.end());
    order.insert(order.end(), of_head.begin(), of_head.end());
  }
  std::int32_t* device_order = device_copy(order);
  p.order = device_order;
  PageEntry* device_pages = device_copy(pages);
  p.pages = device_pages;
  p.pool = device_alloc<uint8_t>(std::size_t{unit} * kTileAlignment);
  p.key_sets = device_alloc<HalfBits>(std::size_t(n_kv_heads) * 2 * 2 * d);
  p.value_factors = device_alloc<float>(std::size_t(n_kv_heads) * d);
  p.workspace = device_alloc<std::uint32_t>(pack_workspace_words(p));
  const Timing pack_time = time_graph(n_copies, n_samples, [&](int copy, cudaStream_t stream) {
    PackParams at = p;
    at.k = k + copy * size;
    at.v = v + copy * size;
    require_ok(pack(at, stream));
  });
  const std::string name = std::to_string(n_tokens / 1024) + "k";
  report.line("pack", name, size * 4.0 + double(unit) * kTileAlignment, pack_time);

  ProbeParams r;
  r.n_tokens = n_tokens;
  r.n_probes = n_probes;
  r.n_kv_heads = n_kv_heads;
  r.n_heads = n_heads;
  r.head_dim = d;
  r.scale = 1 / std::sqrt(float(d));
  r.token_stride = n_kv_heads * d;
  HalfBits* q = device_alloc<HalfBits>(std::size_t(n_probes) * n_heads * d);
  fill_normal<<<256, 256>>>(q, std::size_t(n_probes) * n_heads * d, 10);
  r.q = q;
  std::vector<std::int32_t> positions(n_probes);
  for (int n = 0; n < n_probes; ++n) {  // half of them the newest, half spread over the rest
    positions[n] = n < n_probes / 2 ? int(int64_t{n} * n_tokens * 2 / n_probes) * 63 / 64
                                    : n_tokens - n_probes + n;
  }
  r.positions = device_copy(positions);
  r.lse = device_copy(std::vector<float>(std::size_t(n_probes) * n_heads, 15.7f));
  r.saliency = device_alloc<float>(std::size_t(n_kv_heads) * n_tokens);
  const Timing probe_time = time_graph(n_copies, n_samples, [&](int copy, cudaStream_t stream) {
    ProbeParams at = r;
    at.k = k + copy * size;
    require_ok(probe_saliency(at, stream));
  });
  double pairs = 0;
  for (const std::int32_t position : positions) {
    pairs += double(position + 1) * n_heads;
  }
  char extra[80];
  std::snprintf(extra, sizeof(extra), "%.0f TFLOP/s", pairs * d * 2 / probe_time.median * 1e-12);
  report.line("probe", name + ", " + std::to_string(n_probes) + " probes", size * 2.0, probe_time,
              extra);
  for (void* memory : {static_cast<void*>(k), static_cast<void*>(v), static_cast<void*>(q),
                       static_cast<void*>(p.pool), static_cast<void*>(device_order),
                       static_cast<void*>(device_pages)}) {
    cudaFree(memory);
  }
}

}  // namespace
}  // namespace zipcache::cuda

int main(int argc, char** argv) {
  using namespace zipcache::cuda;  // NOLINT(google-build-using-namespace)
  Report report;
  int n_samples = 40;
  std::string filter;
  for (int at = 1; at < argc; ++at) {
    if (std::strcmp(argv[at], "--quick") == 0) {
      n_samples = 10;
    } else if (std::strcmp(argv[at], "--filter") == 0 && at + 1 < argc) {
      filter = argv[++at];
    } else if (std::strcmp(argv[at], "--json") == 0 && at + 1 < argc) {
      report.json = std::fopen(argv[++at], "w");
    } else {
      std::fprintf(stderr, "usage: %s [--quick] [--json FILE]\n", argv[0]);
      return 2;
    }
  }
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  report.device = device.name;
  std::printf("%s, %d SMs, L2 %d MB\n", device.name, device.multiProcessorCount,
              device.l2CacheSize >> 20);
  const auto wanted = [&](const std::string& name) {
    if (filter.starts_with('=')) {
      return name == filter.substr(1);
    }
    return filter.empty() || name.find(filter) != std::string::npos;
  };
  if (wanted("ceilings")) {
    bench_ceilings(report, n_samples);
  }

  using Classes = std::vector<PageClass>;
  const Classes mixed{{4, 4}, {2, 2}}, low{{2, 2}}, high{{4, 4}}, three{{4, 3}, {3, 3}, {3, 2}};
  const Shape shapes[] = {
      {"B8 32k mixed", 8, 32768, mixed, {0.6, 0.4}},
      {"B8 32k mixed tail 64", 8, 32768, mixed, {0.6, 0.4}, 64},
      {"B8 32k 2-bit", 8, 32768, low, {1}},
      {"B8 32k 4-bit", 8, 32768, high, {1}},
      {"B8 32k default", 8, 32768, three, {0.3, 0.2, 0.5}},
      {"B64 4k mixed", 64, 4096, mixed, {0.6, 0.4}},
      {"B64 4k mixed tail 64", 64, 4096, mixed, {0.6, 0.4}, 64},
      {"B1 128k mixed", 1, 131072, mixed, {0.6, 0.4}},
      {"B1 32k mixed", 1, 32768, mixed, {0.6, 0.4}},
      {"B1 32k mixed tail 64", 1, 32768, mixed, {0.6, 0.4}, 64},
      {"B8 4k mixed", 8, 4096, mixed, {0.6, 0.4}},
      {"B1 4k mixed", 1, 4096, mixed, {0.6, 0.4}},
      {"B8 32k 8-bit", 8, 32768, {{8, 8}}, {1}},
      {"B8 32k mixed d64", 8, 32768, mixed, {0.6, 0.4}, 0, 32, 8, 64},
      {"B8 32k mixed d256 G2", 8, 32768, mixed, {0.6, 0.4}, 0, 16, 8, 256},
      {"B8 32k mixed G8", 8, 32768, mixed, {0.6, 0.4}, 0, 64, 8, 128},
  };
  for (const Shape& shape : shapes) {
    if (wanted(shape.name)) {
      bench_decode(report, shape, n_samples);
    }
  }
  if (wanted("prefill")) {
    bench_prefill(report, 32768, 512, n_samples);
    bench_prefill(report, 4096, 204, n_samples);
  }
  return 0;
}
