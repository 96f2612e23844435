#include "bench/op_bench.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <utility>

#include "bench/cache_attention.h"
#include "bench/measure.h"
#include "bench/peaks.h"
#include "kernels/kernels.h"
#include "policy/policy.h"

namespace zipcache::bench {
namespace {

constexpr std::uint64_t kSeed = 1;

struct Peer {
  std::string name;
  std::unique_ptr<HostAttention> attention;
  std::vector<double> seconds;
};

// Root mean square of the outputs' difference over that of the peer's: what compression changes,
// or, under policy fp16, whether both compute the same.
double difference(const std::vector<float>& ours, const float* theirs) {
  double power = 0, error = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double apart = double{ours[i]} - double{theirs[i]};
    power += double{theirs[i]} * double{theirs[i]};
    error += apart * apart;
  }
  return std::sqrt(error / power);
}

// Multiply-adds of both halves, two operations each; rows of the causal triangle as they are.
double operations(const AttentionShape& shape, std::uint32_t n_kv, std::uint32_t n_query) {
  const double seen = double(n_query) * (n_kv - n_query) + 0.5 * n_query * (n_query + 1.0);
  return 4.0 * seen * shape.n_heads * shape.head_dim;
}

class OpBench {
 public:
  OpBench(const OpOptions& options, const kernels::KernelTable* kernels, const Records& records)
      : options_(options), kernels_(kernels), records_(records) {
    for (const std::uint32_t n_threads : options.threads) {
      peaks_.emplace(n_threads, measure_peaks(kernels->isa, n_threads));
    }
  }

  // For the points that follow. Time depends on shapes alone, so in place of a calibration one
  // stands that says nothing.
  Status choose_policy(const AttentionShape& shape) {
    const policy::Calibration flat =
        policy::flat_calibration(shape.n_kv_heads, shape.head_dim, shape.head_dim);
    Expected<policy::Policy> policy = policy::make_policy(options_.settings, &flat);
    if (!policy) {
      return policy.error();
    }
    policy_ = std::make_shared<const policy::Policy>(std::move(*policy));
    return ok_status();
  }

  // REQUIRES: the policy is chosen for this shape.
  Status measure(const AttentionShape& shape, std::uint32_t n_kv, std::uint32_t n_query) {
    const RandomRows rows(kSeed);
    CacheAttention ours(shape, policy_, kernels_, n_kv, n_query, rows);
    std::vector<Peer> peers;
    for (const std::string& name : options_.peers) {
      const Expected<ggml_type> type = cache_type(name);
      if (!type) {
        return type.error();
      }
      peers.push_back(
          {name, std::make_unique<HostAttention>(shape, *type, n_kv, n_query, rows), {}});
    }
    for (const std::uint32_t n_threads : options_.threads) {
      std::vector<double> seconds, commit_seconds;
      for (Peer& peer : peers) {
        peer.seconds.clear();
      }
      for (std::uint32_t round = 0; round <= options_.rounds; ++round) {  // round 0 warms up
        ours.put_newest();
        const double own = ours.run(n_threads, !options_.is_warm);
        if (round > 0) {
          seconds.push_back(own);
          commit_seconds.push_back(ours.commit_seconds());
        }
        for (Peer& peer : peers) {
          const double theirs = peer.attention->run(n_threads, !options_.is_warm);
          if (round > 0) {
            peer.seconds.push_back(theirs);
          }
        }
      }
      if (Status added =
              record(shape, n_kv, n_query, n_threads, ours, seconds, commit_seconds, peers);
          !added) {
        return added;
      }
    }
    return ok_status();
  }

 private:
  Status record(const AttentionShape& shape, std::uint32_t n_kv, std::uint32_t n_query,
                std::uint32_t n_threads, const CacheAttention& ours,
                const std::vector<double>& seconds, const std::vector<double>& commit_seconds,
                const std::vector<Peer>& peers) {
    const Peaks& peaks = peaks_.at(n_threads);
    const double middle = median(seconds);
    const cache::ByteCount bytes = ours.bytes();
    const double read = double(bytes.total() - bytes.slack) / middle;
    const double flops = operations(shape, n_kv, n_query) / middle;
    const double read_share = read / peaks.read_bytes_per_s;
    const bool has_dot = peaks.dot_flops_per_s > 0;
    const double flops_share = flops / (has_dot ? peaks.dot_flops_per_s : peaks.fma_flops_per_s);
    nlohmann::json record = {
        {"bench", "op"},
        {"shape",
         {{"n_heads", shape.n_heads},
          {"n_kv_heads", shape.n_kv_heads},
          {"head_dim", shape.head_dim}}},
        {"n_kv", n_kv},
        {"n_query", n_query},
        {"batch", 1},
        {"policy", options_.settings.empty() ? "default" : policy::describe(*policy_)},
        {"seconds", middle},
        {"spread", spread(seconds)},
        {"commit_seconds", median(commit_seconds)},
        {"bytes", bytes.total() - bytes.slack},
        {"scratch_bytes", ours.scratch_bytes()},
        {"bytes_per_s", read},
        {"peak_bytes_per_s", peaks.read_bytes_per_s},
        {"flops_per_s", flops},
        {"peak_flops_per_s", peaks.fma_flops_per_s},
        {"peak_dot_flops_per_s", peaks.dot_flops_per_s},
        {"binds", read_share > flops_share ? "memory" : "compute"},
        {"peers", nlohmann::json::object()},
        {"peer_spread", nlohmann::json::object()},
        {"device", kernels_->isa},
        {"threads", n_threads}};
    std::string versus;
    for (const Peer& peer : peers) {
      const double theirs = median(peer.seconds);
      record["peers"][peer.name] = theirs;
      record["peer_spread"][peer.name] = spread(peer.seconds);
      versus += fmt::format("  {} {:.3f} ms {:.2f}x", peer.name, theirs * 1e3, theirs / middle);
    }
    if (!peers.empty()) {
      record["difference"] = difference(ours.output(), peers.front().attention->output());
    }
    fmt::print(
        "{}/{} x {:<3} {:>6} cells {:>4} queries {} threads {}: {:.3f} ms (commit {:.3f})  "
        "{:.1f} GB/s {:.0f} %  {:.0f} GFLOP/s {:.0f} %{}\n",
        shape.n_heads, shape.n_kv_heads, shape.head_dim, n_kv, n_query, n_threads, kernels_->isa,
        middle * 1e3, median(commit_seconds) * 1e3, read / 1e9, 100 * read_share, flops / 1e9,
        100 * flops_share, versus);
    std::fflush(stdout);
    return records_.add(std::move(record));
  }

  const OpOptions& options_;
  const kernels::KernelTable* kernels_;
  std::shared_ptr<const policy::Policy> policy_;
  std::map<std::uint32_t, Peaks> peaks_;
  const Records& records_;
};

}  // namespace

Status bench_op(const OpOptions& options, const Records& records) {
  const Expected<const kernels::KernelTable*> kernels = kernels::select_kernels(options.isa);
  if (!kernels) {
    return kernels.error();
  }
  OpBench bench(options, *kernels, records);
  for (const AttentionShape& shape : options.shapes) {
    if (Status chosen = bench.choose_policy(shape); !chosen) {
      return chosen;
    }
    for (const std::uint32_t n_query : options.n_query) {
      for (const std::uint32_t n_kv : options.n_kv) {
        if (n_query > n_kv) {
          continue;
        }
        if (Status done = bench.measure(shape, n_kv, n_query); !done) {
          return done;
        }
      }
    }
  }
  return ok_status();
}

}  // namespace zipcache::bench
