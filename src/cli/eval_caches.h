// The caches that an evaluation compares: sessions of one model under llama.cpp's own cache types
// and under the plug-in, one open at a time.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "base/expected.h"
#include "cache/bytes.h"
#include "cli/model.h"
#include "cli/plugin.h"
#include "cli/session.h"
#include "eval/policy_spec.h"

namespace zipcache::cli {

class EvalCaches {
 public:
  // Loads what the policies need; a policy that the plug-in refuses is an error right away.
  static Expected<EvalCaches> load(const std::string& model_path, const std::string& plugin_path,
                                   std::span<const eval::PolicySpec> policies);

  // options.cache_type is the policy's. REQUIRES: no other session of these caches is open.
  Expected<Session> open(const eval::PolicySpec& policy, SessionOptions options) const;

  // What the open session holds, as its cache reports it.
  Expected<cache::ByteCount> bytes(const eval::PolicySpec& policy, const Session& session) const;

  // For tokens and templates; the same whichever cache is used.
  const Model& model() const { return *host_model_; }
  const std::optional<Plugin>& plugin() const { return plugin_; }

 private:
  EvalCaches() = default;

  std::optional<Plugin> plugin_;
  std::optional<Model> host_model_;
  std::optional<Model> plugin_model_;
};

}  // namespace zipcache::cli
