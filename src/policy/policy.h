// What a cache does with its tokens: which are sealed when, into which classes, at which precision.
// A Policy is plain data; make_policy() builds a checked one from the user's settings. Each policy
// that a user can name is one file of this room (method.h).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/expected.h"
#include "format/block.h"
#include "policy/calibration.h"
#include "quant/block_codec.h"
#include "saliency/probes.h"
#include "saliency/ranking.h"

namespace zipcache::policy {

// Where the channel factors of a channel-separable tensor come from.
enum class Factors : std::uint8_t {
  kOwn,       // the tokens that are quantized together: sqrt(max |x|)
  kBalanced,  // keys: sqrt(max |k| / max |q|) of the sequence up to its first sealing, then frozen
  kGiven,     // Policy::given
};

struct TensorPolicy {
  format::Granularity granularity = format::Granularity::kChannelwise;
  format::TokenParams token_params = format::TokenParams::kHalf;
  Factors factors = Factors::kOwn;
  bool reordered = false;  // channels stand in an order of Policy::given
  bool class_factors = false;
  bool slot_shared = false;
  std::uint16_t group_channels = 0;  // 0 = head_dim
  std::uint8_t n_classes = 1;
  std::array<std::uint8_t, 2> bits{4, 2};
  std::uint32_t salient_bp = 10000;  // share of tokens in class 0, basis points
  std::uint32_t class_multiple = 1;  // class 0 counts are rounded to this
  std::uint32_t wide_bp = 0;         // keys: share of a head's channels that have wide_bits
  std::uint8_t wide_bits = 4;
  std::uint16_t group_tokens = 0;     // channelwise: tokens that share a scale, 0 = the block's
  std::uint8_t rank = 0;              // of the low-rank term
  std::uint8_t small_block_rank = 0;  // the same in blocks of up to small_block_tokens
  std::uint32_t small_block_tokens = 0;
  std::uint32_t outlier_bp = 0;  // share of each channel (K) or token (V) that is kept as outliers
  quant::TensorRules rules;
};

// What calibration says of a layer's channels, for all of its KV heads; empty where the policy does
// not ask for it. See quant::TensorRules.
struct LayerChannels {
  std::uint32_t n_kv_heads = 0, key_dim = 0, value_dim = 0;
  std::vector<float> key_factors{}, value_factors{};      // Factors::kGiven
  std::vector<std::uint16_t> key_order{}, value_order{};  // TensorPolicy::reordered
};

struct Policy {
  std::string name = "zipcache";
  // Every setting that applies, defaults included: what made this policy.
  std::map<std::string, std::string> settings;
  bool keeps_exact = false;  // nothing is ever sealed; the rest does not matter
  TensorPolicy key;
  TensorPolicy value;

  // By layer; empty unless a tensor has factors or an order from it.
  std::map<std::uint32_t, LayerChannels> given;

  // > 0: of each block, salient_bp and key.wide_bp are what makes it take at most this many
  // hundredths of a bit per element, everything in it counted.
  std::uint32_t kv_centibits = 0;

  // When tokens are sealed. Of each sequence the first `sink_tokens` never are, the newest
  // held_tokens() not yet; the others are once at least `seal_tokens` of them are staged (with
  // `seal_chunks` also whenever a prefill chunk ends), in multiples of `seal_multiple` and what
  // remains if that is more than `rest_tokens`, in blocks of at most `block_tokens` (0 = one
  // block).
  std::uint32_t sink_tokens = 4;
  std::uint32_t hold_tokens = 28;
  // Held at most: this share of a sequence's tokens so far, but for the first `hold_after`.
  std::uint32_t hold_share_bp = 10000;
  std::uint32_t hold_after = 0;
  std::uint32_t hold_bp = 0;  // held at least: this share of a sequence's tokens so far
  std::uint32_t seal_tokens = 64;
  // A step of this many tokens or more is a chunk of a prompt and seals as few as these.
  std::uint32_t chunk_tokens = UINT32_MAX;
  // Width of what a step leaves staged: 16 = exact, 8 = packed (cache/staging_page.h).
  std::uint8_t staging_bits = 16;
  // Eviction: class 1 has width 0, class 0 is key.salient_bp of the tokens of the sequence so far.
  // Sealed tokens go on receiving attention and are ranked again with every sealing.
  bool evicts = false;
  std::uint32_t seal_multiple = 32;
  std::uint32_t rest_tokens = UINT32_MAX;
  std::uint32_t block_tokens = 512;
  bool seal_chunks = false;
  // > 0: up to `seal_tokens` staged tokens join the last block of their sequence, on its grids,
  // once append_tokens() of them wait, while it has at most `append_limit`.
  std::uint32_t append_tokens = 0;
  std::uint32_t append_limit = 2048;
  // Values of the newest so many tokens of a sequence stay exact (width 16) when their keys are
  // sealed; the last ones of a seal are therefore sealed in blocks of `value_hold_block` tokens.
  std::uint32_t value_hold_tokens = 0;
  std::uint32_t value_hold_block = 32;
  // Of fewer tokens than this a ranking means nothing: all are salient.
  std::uint32_t min_ranked_tokens = 0;
  // `official`: whenever tokens are sealed, every sealed token of the sequence is quantized anew
  // with them, its class kept.
  bool requantize_all = false;

  saliency::Metric metric = saliency::Metric::kNormalized;
  saliency::ProbeRule probes = saliency::ProbeRule::kDefault;
  std::vector<std::uint32_t> probe_positions;  // ProbeRule::kSpecial
  std::uint32_t recent_bp = 0;  // share of a block's tokens, the newest, that rank above all others
  std::uint64_t seed = 0;

  bool seals() const { return !keeps_exact; }
  bool ranks() const { return key.n_classes == 2 || value.n_classes == 2; }
  // With what is given for a layer, as spans of this policy. REQUIRES: serves_layer().
  quant::QuantRules quant_rules(std::uint32_t layer) const;
};

// The setting names, each with its accepted values and a line of help: the source of the table in
// docs and of `zipcache run --help`.
struct SettingHelp {
  std::string name;    // e.g. "key-bits"; the environment variable is ZIPCACHE_KEY_BITS
  std::string values;  // e.g. "HI,LO or one width of 2, 3, 4, 8"
  std::string help;    // what it does, and its default under the default policy if it applies there
};
const std::vector<SettingHelp>& setting_help();

// Each policy by name, and each mode of one that has modes, in the order of the docs.
struct PolicyHelp {
  std::string name;                             // "zipcache", "zipcache mode=paper"
  std::string summary;                          // one line
  std::map<std::string, std::string> defaults;  // every setting that it takes but `policy`
};
const std::vector<PolicyHelp>& policy_help();

// Builds a policy from settings (names as in setting_help(), without the ZIPCACHE_ prefix, lower
// case, '-' between words). Unknown names, malformed values and impossible combinations are errors
// that name the setting, what was found and what is accepted. A setting that the chosen policy
// does not use is an error too.
// Policies that need a calibration say so in an error when it is nullptr; the setting of that name
// is only text here: who reads the file passes its content.
Expected<Policy> make_policy(const std::map<std::string, std::string>& settings,
                             const Calibration* calibration = nullptr);

// Every setting that applies to a policy of make_policy(), defaults included, so that
// make_policy(to_settings(policy)) is the same policy: what a result file records.
std::map<std::string, std::string> to_settings(const Policy& policy);

// kUnsupported when the policy is calibrated and not for a layer like this.
Status serves_layer(const Policy& policy, std::uint32_t layer, std::uint32_t n_kv_heads,
                    std::uint32_t key_dim, std::uint32_t value_dim);

// One line for logs: "zipcache default: K channelwise 4/2 bits (20 % salient, ...), V ..."
std::string describe(const Policy& policy);

// Shape of the block that seals n_tokens under this policy, with exact values if these are still
// held. Whether the head dimensions suit it
// (a channel group must divide them) is for BlockLayout::is_valid() to say.
// REQUIRES: policy.seals().
format::BlockShape block_shape(const Policy& policy, std::uint32_t n_tokens,
                               std::uint32_t n_kv_heads, std::uint32_t key_dim,
                               std::uint32_t value_dim, bool hold_values = false);

// The least hundredths of a bit per element that a block of these tokens can be told to take by
// kv_centibits, rounded up.
std::uint32_t least_centibits(const Policy& policy, std::uint32_t n_tokens,
                              std::uint32_t n_kv_heads, std::uint32_t key_dim,
                              std::uint32_t value_dim);

// Shape of `n_tokens` that join a block, or nothing where they can't: classes grow to what a block
// of all of them would have. See format/block_join.h.
std::optional<format::BlockShape> added_shape(const Policy& policy, const format::BlockShape& block,
                                              std::uint32_t n_tokens);

// How many tokens of a sequence of `n_tokens` wait until they join its last block.
// REQUIRES: policy.append_tokens > 0.
std::uint32_t append_tokens(const Policy& policy, std::uint32_t n_tokens);

// How many of the newest tokens of a sequence of `n_tokens` wait.
std::uint32_t held_tokens(const Policy& policy, std::uint32_t n_tokens);

// Of `n_sealable` staged tokens of a sequence (sinks and held ones not counted), how many to seal
// after a step that added `n_new` tokens to it, as block sizes in order, oldest tokens first; empty
// when it is too early. With seal_chunks n_new > 1 is a prefill chunk, which seals everything, and
// n_new == 1 a decode step.
std::vector<std::uint32_t> plan_seal(const Policy& policy, std::uint32_t n_sealable,
                                     std::uint32_t n_new);

}  // namespace zipcache::policy
