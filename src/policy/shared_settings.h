// Settings that several policies read in the same way. Internal to this room.
#pragma once

#include <cstdint>
#include <string>

#include "policy/settings.h"

namespace zipcache::policy {

// A preset's hold_tokens: as many as fill up the sinks to whole pages of 32 tokens, so that block
// borders stay multiples of 32 when a prompt comes in chunks of a power of two.
inline constexpr std::uint32_t kFillWindow = UINT32_MAX;

// NAME-bits, NAME-salient (if there may be two classes) and NAME-clip; `name` is "key" or "value".
// default_clip is nullptr where the preset clips nothing.
void read_tensor(SettingReader& in, const std::string& name, std::size_t max_classes,
                 float (*default_clip)(int bits), TensorPolicy& tensor, bool exact_high = false);

// key-wide and key-wide-bits.
void read_wide_channels(SettingReader& in, TensorPolicy& key);

// kv-bits. REQUIRES: what it chooses was read.
void read_budget(SettingReader& in, Policy& policy);

// Channels that share a scale.
std::uint16_t read_group(SettingReader& in, std::string_view name, std::uint16_t fallback);

// sinks, hold, seal, block.
void read_schedule(SettingReader& in, Policy& policy);

// hold-share and staging-bits.
void read_staging(SettingReader& in, Policy& policy);

// metric, probes, probe-positions, seed.
void read_ranking(SettingReader& in, Policy& policy);

// Sealing as the paper and its code do: a prompt at once, decoded tokens by the hundred, none exact
// but those that wait; fewer than 20 tokens are not ranked (they have no random probe).
void seal_as_published(Policy& policy);

}  // namespace zipcache::policy
