#include "cache/cuda/device_policy.h"

#include <algorithm>

namespace zipcache::cuda {
namespace {

constexpr std::uint32_t kMaxBlock = 4096;  // tokens that one launch ranks

Error refused(const std::string& found, const std::string& supported) {
  return unsupported("ZipCacheCUDA: found " + found + ", supported " + supported +
                     "; use -dev ZipCache (CPU) or another policy");
}

Status check_tensor(const policy::TensorPolicy& tensor, format::Granularity granularity,
                    const char* name) {
  const std::string of = std::string(name) + " ";
  if (tensor.granularity != granularity || tensor.group_channels != 0 || tensor.group_tokens != 0) {
    return refused(of + "quantized in another granularity",
                   "channelwise keys and channel-separable values (policies zipcache, uniform)");
  }
  if (tensor.rank != 0 || tensor.small_block_rank != 0 || tensor.outlier_bp != 0 ||
      tensor.factors != policy::Factors::kOwn || tensor.rules.clip_about_zero) {
    return refused(of + "with low-rank terms, outliers or given factors", "plain codes");
  }
  for (int cls = 0; cls < tensor.n_classes; ++cls) {
    if (!is_code_width(tensor.bits[cls])) {
      return refused(of + "of " + std::to_string(tensor.bits[cls]) + " bits", "2, 3, 4, 8 bits");
    }
  }
  return ok_status();
}

// Keys of a class as wide as the wide channels are pages like any other.
bool has_pages_beside_wide(const policy::TensorPolicy& key, int cls) {
  return key.wide_bits == key.bits[cls] ||
         (key.wide_bits == kWideBits && key.bits[cls] == kBitsBesideWide);
}

// In steps of `step` channels that leave some for either width.
int wide_channels(int head_dim, std::uint32_t share_bp, int step) {
  const int whole = 10000 * step;
  const int steps = (head_dim * static_cast<int>(share_bp) + whole / 2) / whole;
  return step * std::min(steps, head_dim / step - 1);
}

}  // namespace

Expected<policy::Policy> device_policy(const policy::Policy& asked) {
  if (Status ok = check_tensor(asked.key, format::Granularity::kChannelwise, "keys"); !ok) {
    return ok.error();
  }
  if (Status ok = check_tensor(asked.value, format::Granularity::kChannelSeparable, "values");
      !ok) {
    return ok.error();
  }
  if (asked.kv_centibits != 0) {
    return refused("kv-bits", "key-wide, key-salient and value-salient by themselves");
  }
  for (int cls = 0; asked.key.wide_bp != 0 && cls < asked.key.n_classes; ++cls) {
    if (!has_pages_beside_wide(asked.key, cls)) {
      return refused("key channels of " + std::to_string(asked.key.wide_bits) + " bits beside " +
                         std::to_string(asked.key.bits[cls]) + " bits",
                     "key-wide-bits 4 with key-bits of 4 and 2");
    }
  }
  if (asked.evicts || asked.requantize_all || asked.value_hold_tokens != 0 || asked.hold_bp != 0 ||
      asked.recent_bp != 0 || asked.value.class_factors || asked.value.slot_shared) {
    return refused("policy " + asked.name + " with eviction, held values or published sealing",
                   "zipcache in its default mode and uniform");
  }
  if (asked.ranks() && asked.metric != saliency::Metric::kNormalized) {
    return refused("another metric than 'normalized'", "metric=normalized");
  }
  policy::Policy used = asked;
  const auto whole_pages = [](std::uint32_t n) {
    return (n + kPageTokens - 1) / kPageTokens * kPageTokens;
  };
  // The window is exact, as long in short prompts as in long ones.
  used.staging_bits = 16;
  used.hold_share_bp = 10000;
  used.seal_multiple = kPageTokens;
  used.rest_tokens = kPageTokens;
  used.chunk_tokens = UINT32_MAX;
  used.append_tokens = 0;
  used.seal_tokens = whole_pages(asked.seal_tokens);
  used.block_tokens =
      std::min(whole_pages(asked.block_tokens == 0 ? kMaxBlock : asked.block_tokens), kMaxBlock);
  used.key.class_multiple = used.value.class_multiple = kPageTokens;
  if (used.sink_tokens + used.hold_tokens + used.seal_tokens > kTailTokens) {
    return refused("sinks + hold + seal of " +
                       std::to_string(used.sink_tokens + used.hold_tokens + used.seal_tokens) +
                       " tokens",
                   "up to " + std::to_string(kTailTokens));
  }
  return used;
}

std::string device_policy_note(const policy::Policy& asked, const policy::Policy& used) {
  std::string note;
  if (asked.ranks()) {
    note =
        "salient tokens are counted in pages of 64 on CUDA, blocks of fewer than 256 may have one "
        "class";
  }
  const auto differs = [&](int head_dim) {
    return wide_channels(head_dim, asked.key.wide_bp, kChunkChannels) !=
           wide_channels(head_dim, asked.key.wide_bp, kChunkChannels / 2);
  };
  if (differs(64) || differs(128) || differs(256)) {
    note += std::string(note.empty() ? "" : "; ") + "wide key channels are counted in steps of 32";
  }
  if (asked.value.token_params != format::TokenParams::kHalf) {
    note += std::string(note.empty() ? "" : "; ") + "value-params are fp16 pairs";
  }
  if (asked.staging_bits != used.staging_bits || asked.hold_share_bp != used.hold_share_bp) {
    note += std::string(note.empty() ? "" : "; ") + "tokens that wait are exact at any length";
  }
  if (asked.append_tokens != 0) {
    note += std::string(note.empty() ? "" : "; ") + "decoded tokens get blocks of their own";
  }
  if (used.seal_tokens != asked.seal_tokens) {
    note += std::string(note.empty() ? "" : "; ") + "seal is " + std::to_string(used.seal_tokens);
  }
  return note;
}

std::array<PageClass, kPolicyClasses> page_classes(const policy::Policy& policy, int head_dim) {
  const auto bits = [](const policy::TensorPolicy& tensor, int cls) {
    return tensor.bits[tensor.n_classes == 2 ? cls : 0];
  };
  const auto wide_chunks = static_cast<std::uint8_t>(
      wide_channels(head_dim, policy.key.wide_bp, kChunkChannels) / kChunkChannels);
  std::array<PageClass, kPolicyClasses> classes;
  for (int n = 0; n < kPolicyClasses; ++n) {
    PageClass& cls = classes[n];
    cls = {bits(policy.key, n / 2), bits(policy.value, n % 2)};
    if (wide_chunks > 0 && cls.key_bits != policy.key.wide_bits) {
      cls.wide_chunks = wide_chunks;
      cls.wide_bits = policy.key.wide_bits;
    }
  }
  return classes;
}

BlockClasses block_classes(const policy::Policy& policy, std::uint32_t n_tokens) {
  const auto class0 = [&](const policy::TensorPolicy& tensor) {
    return tensor.n_classes == 2 && n_tokens >= policy.min_ranked_tokens
               ? saliency::salient_tokens(n_tokens, tensor.salient_bp, tensor.class_multiple)
               : n_tokens;
  };
  const std::uint32_t keys = class0(policy.key), values = class0(policy.value);
  BlockClasses block;
  std::uint32_t begin = 0;
  std::array<int, 2> set_of{-1, -1};
  for (const std::uint32_t end : {std::min(keys, values), std::max(keys, values), n_tokens}) {
    if (end <= begin) {
      continue;
    }
    const int key_class = begin < keys ? 0 : 1, value_class = begin < values ? 0 : 1;
    if (set_of[key_class] < 0) {
      set_of[key_class] = block.n_key_sets++;
    }
    block.classes[block.n_classes++] = {static_cast<std::uint8_t>(2 * key_class + value_class),
                                        static_cast<std::uint8_t>(set_of[key_class]), end - begin,
                                        policy.key.rules.clip[key_class],
                                        policy.value.rules.clip[value_class]};
    begin = end;
  }
  return block;
}

}  // namespace zipcache::cuda
