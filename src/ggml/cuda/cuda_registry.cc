#include "ggml/cuda/cuda_registry.h"

#include <unistd.h>

#include <cstring>
#include <mutex>
#include <optional>
#include <string>

#include "cache/cuda/device_policy.h"
#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/log.h"
#include "ggml/tables.h"

namespace zipcache::ggml {
namespace {

constexpr const char* kInnerName = "CUDA0";

struct Globals {
  ggml_backend_dev_t inner = nullptr;
  std::optional<Settings> settings;
  ggml_backend_device device{};
  ggml_backend_reg registry{};
};

// Never destroyed, as its backends and buffers may outlive every destructor of a global.
Globals& globals() {
  static auto* const kGlobals = new Globals;
  return *kGlobals;
}

struct Plugin {
  static constexpr const char* kName = kCudaDeviceName;
  static ggml_backend_dev_t device() { return &globals().device; }
  static void* proc_address(const char* /*name*/) { return nullptr; }
};

Status set_up(Globals& all) {
  all.inner = ggml_backend_dev_by_name(kInnerName);
  if (all.inner == nullptr) {
    return unsupported(std::string("no device ") + kInnerName +
                       " is loaded, and ZipCacheCUDA computes with it; build llama.cpp with "
                       "-DGGML_CUDA=ON");
  }
  Expected<SettingMap> values = settings_from_environment(environ);
  if (!values) {
    return values.error();
  }
  Expected<Settings> settings = make_settings(*values);
  if (!settings) {
    return settings.error();
  }
  if (settings->observes) {
    return unsupported(
        "ZipCacheCUDA: found observe=on, supported off; use -dev ZipCache (CPU) to calibrate");
  }
  if (settings->policy->seals()) {
    Expected<policy::Policy> used = cuda::device_policy(*settings->policy);
    if (!used) {
      return used.error();
    }
    const std::string note = cuda::device_policy_note(*settings->policy, *used);
    log_info(policy::describe(*settings->policy) + "; CUDA" + (note.empty() ? "" : ": " + note));
    settings->policy = std::make_shared<const policy::Policy>(std::move(*used));
  }
  all.registry = RegistryTable<Plugin>::make();
  all.device = {.iface = cuda_device_interface(), .reg = &all.registry, .context = nullptr};
  set_cuda_buffer_type_device(&all.device);
  all.settings = std::move(*settings);
  return ok_status();
}

}  // namespace

Expected<ggml_backend_reg_t> make_cuda_registry() {
  Globals& all = globals();
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (!all.settings) {
    if (Status done = set_up(all); !done) {
      return done.error();
    }
  }
  return &all.registry;
}

ggml_backend_dev_t inner_device() { return globals().inner; }
bool takes_over() { return globals().settings->policy->seals(); }
const Settings& cuda_settings() { return *globals().settings; }

}  // namespace zipcache::ggml
