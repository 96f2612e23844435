#include "cli/eval_caches.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "cli/cache_report.h"
#include "cli/host_log.h"

namespace zipcache::cli {
namespace {

ggml_type host_type(const eval::PolicySpec& policy) {
  if (policy.host_type == "q8_0") {
    return GGML_TYPE_Q8_0;
  }
  return policy.host_type == "q4_0" ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;
}

Status configure(const Plugin& plugin, const eval::PolicySpec& policy) {
  auto settings = policy.settings;
  settings.emplace("report", "0");  // the evaluation makes its own tables
  if (Status configured = plugin.configure(settings); !configured) {
    return invalid_argument("policy '" + policy.name + "': " + configured.error().message);
  }
  return ok_status();
}

}  // namespace

Expected<EvalCaches> EvalCaches::load(const std::string& model_path, const std::string& plugin_path,
                                      std::span<const eval::PolicySpec> policies) {
  EvalCaches caches;
  const bool needs_plugin = std::any_of(policies.begin(), policies.end(),
                                        [](const auto& policy) { return !policy.is_host(); });
  if (needs_plugin) {
    Expected<Plugin> plugin = Plugin::load(plugin_path);
    if (!plugin) {
      return plugin.error();
    }
    for (const eval::PolicySpec& policy : policies) {
      if (Status fits = policy.is_host() ? ok_status() : configure(*plugin, policy); !fits) {
        return fits.error();
      }
    }
    Expected<Model> model = Model::load(model_path, plugin->device());
    if (!model) {
      return model.error();
    }
    caches.plugin_ = std::move(*plugin);
    caches.plugin_model_ = std::move(*model);
  }
  Expected<Model> model = Model::load(model_path, nullptr);
  if (!model) {
    return model.error();
  }
  caches.host_model_ = std::move(*model);
  return caches;
}

Expected<Session> EvalCaches::open(const eval::PolicySpec& policy, SessionOptions options) const {
  if (policy.is_host()) {
    options.cache_type = host_type(policy);
    return Session::open(*host_model_, options);
  }
  if (Status configured = configure(*plugin_, policy); !configured) {
    return configured.error();
  }
  Expected<Session> session = Session::open(*plugin_model_, options);
  if (session && has_plugin_warning()) {
    return unsupported("policy '" + policy.name + "': " + explain_failure(""));
  }
  return session;
}

Expected<cache::ByteCount> EvalCaches::bytes(const eval::PolicySpec& policy,
                                             const Session& session) const {
  if (policy.is_host()) {
    const ggml_type type = host_type(policy);
    const double bytes_per_element = double(ggml_type_size(type)) / double(ggml_blck_size(type));
    const std::size_t held = session.state_bytes();
    cache::ByteCount bytes;
    (type == GGML_TYPE_F16 ? bytes.staging : bytes.codes) = held;
    bytes.fp16 = static_cast<std::size_t>(
        std::lround(double(held) * sizeof(ggml_fp16_t) / bytes_per_element));
    return bytes;
  }
  const Expected<CacheReport> report = parse_report(plugin_->report_json());
  if (!report) {
    return report.error();
  }
  return cache::ByteCount{.codes = report->bytes.codes,
                          .params = report->bytes.params,
                          .masks = report->bytes.masks,
                          .staging = report->bytes.staging,
                          .slack = report->bytes.slack,
                          .fp16 = report->fp16_bytes};
}

}  // namespace zipcache::cli
