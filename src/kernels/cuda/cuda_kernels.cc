#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "base/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill_config.h"

namespace zipcache::cuda {
namespace {

Error missing(const std::string& what, const std::string& required, const std::string& supported) {
  return unsupported("cuda " + what + ": required " + required + ", supported " + supported +
                     ", missing a kernel for it");
}
Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) {
    return ok_status();
  }
  return unsupported(std::string("cuda ") + what + ": " + cudaGetErrorString(error));
}

Status check_heads(const char* what, int n_heads, int n_kv_heads, int head_dim) {
  if (!is_head_dim(head_dim)) {
    return missing(what, "head_dim " + std::to_string(head_dim), "head_dim 64, 128, 256");
  }
  if (n_kv_heads <= 0 || n_heads % n_kv_heads != 0 || n_heads / n_kv_heads < 1 ||
      n_heads / n_kv_heads > kMaxGroup) {
    return missing(what,
                   std::to_string(n_heads) + " query heads on " + std::to_string(n_kv_heads) +
                       " key-value heads",
                   "1 to 8 query heads per key-value head");
  }
  return ok_status();
}

Status check_classes(const char* what, int head_dim, std::span<const PageClass> classes) {
  if (classes.empty() || classes.size() > kMaxClasses) {
    return missing(what, std::to_string(classes.size()) + " page classes", "1 to 8");
  }
  for (const PageClass cls : classes) {
    if (!is_page_class(head_dim, cls)) {
      return missing(what,
                     std::to_string(cls.key_bits) + "-bit keys (" +
                         std::to_string(cls.wide_chunks * kChunkChannels) + " channels of " +
                         std::to_string(cls.wide_bits) + " bits) with " +
                         std::to_string(cls.value_bits) + "-bit values",
                     "2, 3, 4, 8 bits, and 4-bit channels of 2-bit keys");
    }
  }
  return ok_status();
}

// The launcher that a shape has.
template <typename Call>
cudaError_t with_launcher(int head_dim, int group, Call call) {
  const auto with_head_dim = [&]<int kLaneHeads>(std::integral_constant<int, kLaneHeads>) {
    switch (head_dim) {
      case 64:
        return call(DecodeLauncher<64, kLaneHeads>());
      case 128:
        return call(DecodeLauncher<128, kLaneHeads>());
      default:
        return call(DecodeLauncher<256, kLaneHeads>());
    }
  };
  return decode_lane_heads(group) == 1 ? with_head_dim(std::integral_constant<int, 1>())
                                       : with_head_dim(std::integral_constant<int, 2>());
}

}  // namespace

Expected<DecodeSetup> prepare_decode(int head_dim, int group, std::span<const PageClass> classes) {
  if (Status status = check_heads("decode", group, 1, head_dim); !status) {
    return status.error();
  }
  if (Status status = check_classes("decode", head_dim, classes); !status) {
    return status.error();
  }
  int device = 0, n_sms = 0, block_limit = 0, sm_limit = 0, reserved = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&block_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&sm_limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  if (n_sms == 0) {
    return unsupported(
        "cuda decode: required a CUDA device, supported compute capability 8.0 and "
        "later, missing any device");
  }

  // Slots that let the registers' number of blocks stay; at least two, if the block may.
  DecodeSetup setup;
  setup.shared.group = group;
  setup.shared.group_inverse = ((1 << 16) + group - 1) / group;
  for (const PageClass cls : classes) {
    setup.shared.slot_bytes = std::max(setup.shared.slot_bytes, tile_bytes(head_dim, cls));
  }
  const int per_block = std::min(block_limit, sm_limit / kDecodeBlocksPerSm - reserved);
  const int fixed = decode_shared(head_dim, group).slots;
  const int per_slot = decode_warps(head_dim) * setup.shared.slot_bytes;
  const int fewest = std::clamp((block_limit - fixed) / per_slot, 1, 2);
  const int most = std::clamp(kRingBytes / setup.shared.slot_bytes, 2, kMaxRingSlots);
  setup.shared.n_slots = std::clamp((per_block - fixed) / per_slot, fewest, most);
  setup.shared.ring_bytes = setup.shared.n_slots * setup.shared.slot_bytes;
  const int shared_bytes = decode_shared_bytes(head_dim, setup.shared);
  if (shared_bytes > block_limit) {
    return missing("decode", std::to_string(shared_bytes) + " bytes of shared memory per block",
                   std::to_string(block_limit));
  }
  int blocks_per_sm = 0, n_clusters = 0;
  const cudaError_t error = with_launcher(head_dim, group, [&](auto launcher) {
    return launcher.prepare(shared_bytes, &blocks_per_sm, &n_clusters);
  });
  if (error != cudaSuccess) {
    return to_status(error, "decode").error();
  }
  setup.resident_blocks = n_sms * std::max(blocks_per_sm, 1);
  setup.resident_clusters = n_clusters;
  return setup;
}

Status decode(const DecodeParams& params, const DecodeSetup& setup, Stream stream) {
  if (Status status = check_heads("decode", params.n_heads, params.n_kv_heads, params.head_dim);
      !status) {
    return status;
  }
  ZC_CHECK(params.n_heads == params.n_kv_heads * setup.shared.group);
  ZC_CHECK(params.cluster_blocks == 1 ||
           (setup.resident_clusters > 0 && params.cluster_blocks == kClusterBlocks &&
            params.n_blocks % kClusterBlocks == 0));
  if (params.n_sequences == 0) {
    return ok_status();
  }
  return to_status(
      with_launcher(params.head_dim, setup.shared.group,
                    [&](auto launcher) { return launcher.launch(params, setup.shared, stream); }),
      "decode");
}

Expected<int> prefill_resident_blocks(int head_dim) {
  if (Status status = check_heads("prefill", 1, 1, head_dim); !status) {
    return status.error();
  }
  int device = 0, n_sms = 0, blocks_per_sm = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device);
  if (const cudaError_t error = prepare_prefill(head_dim, &blocks_per_sm); error != cudaSuccess) {
    return to_status(error, "prefill").error();
  }
  return n_sms * std::max(blocks_per_sm, 1);
}

int prefill_splits(const PrefillParams& params, int n_tokens, int resident_blocks) {
  constexpr int kMinTokens = 4 * kPageTokens;  // of a part: below, starts and merges outweigh it
  const int n_blocks = std::max(prefill_tiles(params) * params.n_kv_heads, 1);
  return std::max(std::min(resident_blocks / n_blocks, n_tokens / kMinTokens), 1);
}

std::size_t prefill_partial_floats(const PrefillParams& params) {
  return params.n_splits <= 1 ? 0
                              : prefill_tickets(params) * params.n_splits *
                                    prefill_tile_rows(params) * (params.head_dim + 2);
}
std::size_t prefill_tickets(const PrefillParams& params) {
  return static_cast<std::size_t>(prefill_tiles(params)) * params.n_kv_heads;
}

Status prefill(const PrefillParams& params, Stream stream) {
  if (Status status = check_heads("prefill", params.n_heads, params.n_kv_heads, params.head_dim);
      !status) {
    return status;
  }
  if (params.n_splits < 1 ||
      (params.n_splits > 1 && (params.partials == nullptr || params.tickets == nullptr))) {
    return invalid_argument("cuda prefill: " + std::to_string(params.n_splits) +
                            " splits need a workspace");
  }
  if (params.row_begin != nullptr && params.page_cells == nullptr) {
    return invalid_argument("cuda prefill: pages need the cells of their tokens");
  }
  if (params.n_queries == 0) {
    return ok_status();
  }
  return to_status(launch_prefill(params, stream), "prefill");
}

int pack_pages(const PackParams& params) {
  int n_pages = 0;
  for (int cls = 0; cls < params.n_classes; ++cls) {
    n_pages += (params.class_tokens[cls] + kPageTokens - 1) / kPageTokens;
  }
  return n_pages;
}

Status pack(std::span<const PackParams> batch, Stream stream) {
  ZC_CHECK(!batch.empty() && batch.size() <= kMaxBatch);
  const PackParams& params = batch[0];
  if (Status status = check_heads("pack", params.n_kv_heads, params.n_kv_heads, params.head_dim);
      !status) {
    return status;
  }
  if (Status status = check_classes("pack", params.head_dim,
                                    {params.classes, static_cast<std::size_t>(params.n_classes)});
      !status) {
    return status;
  }
  if (params.n_key_sets < 1 || params.n_key_sets > kMaxKeySets) {
    return missing("pack", std::to_string(params.n_key_sets) + " scale sets of keys", "1 to 4");
  }
  int total = 0, wide_chunks = 0;
  for (int cls = 0; cls < params.n_classes; ++cls) {
    total += params.class_tokens[cls];
    const int wide = params.classes[cls].wide_chunks;
    if (wide > 0 && wide_chunks > 0 && wide != wide_chunks) {
      return invalid_argument("cuda pack: classes with " + std::to_string(wide_chunks) + " and " +
                              std::to_string(wide) + " chunks of wide channels");
    }
    wide_chunks = std::max(wide_chunks, wide);
  }
  if (wide_chunks > 0 && params.key_orders == nullptr) {
    return invalid_argument("cuda pack: wide channels need key_orders");
  }
  if (total != params.n_tokens) {
    return invalid_argument("cuda pack: the classes hold " + std::to_string(total) +
                            " tokens, the input " + std::to_string(params.n_tokens));
  }
  if (params.n_tokens == 0) {
    return ok_status();
  }
  return to_status(launch_pack(batch, pack_pages(params), stream), "pack");
}

Status query_power(std::span<const QueryPowerParams> batch, Stream stream) {
  ZC_CHECK(!batch.empty() && batch.size() <= kMaxBatch);
  const QueryPowerParams& params = batch[0];
  if (Status status =
          check_heads("query power", params.n_heads, params.n_kv_heads, params.head_dim);
      !status) {
    return status;
  }
  return to_status(launch_query_power(batch, stream), "query power");
}

Status probe_saliency(std::span<const ProbeParams> batch, Stream stream) {
  ZC_CHECK(!batch.empty() && batch.size() <= kMaxBatch);
  const ProbeParams& params = batch[0];
  if (Status status = check_heads("probe", params.n_heads, params.n_kv_heads, params.head_dim);
      !status) {
    return status;
  }
  if (params.n_tokens == 0) {
    return ok_status();
  }
  return to_status(launch_probe(batch, stream), "probe");
}

}  // namespace zipcache::cuda
