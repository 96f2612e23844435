// What the device cache makes of a policy. Pages hold 64 tokens of one class, so classes are
// counted in whole pages; wide channels of keys are counted in steps of 32; the token parameters of
// values are fp16 pairs. What pages can't hold is refused.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "base/expected.h"
#include "kernels/cuda/device_page.h"
#include "policy/policy.h"

namespace zipcache::cuda {

// Of `asked`, with counts in whole pages. kUnsupported names the setting, what was found and what
// is supported. REQUIRES: asked.seals().
Expected<policy::Policy> device_policy(const policy::Policy& asked);

// What a user should know of the difference, one line; empty when there is none.
std::string device_policy_note(const policy::Policy& asked, const policy::Policy& used);

// The widths of page classes: index 2 * (class of the key) + (class of the value).
inline constexpr int kPolicyClasses = 4;
std::array<PageClass, kPolicyClasses> page_classes(const policy::Policy& policy, int head_dim);

// The classes of a block, most salient tokens first, empty ones left out.
struct BlockClass {
  std::uint8_t cls = 0;        // index into page_classes()
  std::uint8_t key_set = 0;    // which of the block's scale sets
  std::uint32_t n_tokens = 0;  // but for the last class a multiple of kPageTokens
  float key_clip = 1;
  float value_clip = 1;
};
struct BlockClasses {
  std::array<BlockClass, kPolicyClasses> classes;
  int n_classes = 0;
  int n_key_sets = 0;
  int n_pages() const {
    int n = 0;
    for (int i = 0; i < n_classes; ++i) {
      n += static_cast<int>(classes[i].n_tokens + kPageTokens - 1) / kPageTokens;
    }
    return n;
  }
};
BlockClasses block_classes(const policy::Policy& policy, std::uint32_t n_tokens);

}  // namespace zipcache::cuda
