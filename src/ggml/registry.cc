#include "ggml/registry.h"

#include <unistd.h>

#include <cstring>
#include <mutex>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/backend.h"
#include "ggml/buffer.h"
#include "ggml/device.h"
#include "ggml/log.h"
#include "ggml/report.h"
#include "ggml/tables.h"

namespace zipcache::ggml {
namespace {

struct Globals {
  Host host;
  const kernels::KernelTable* kernels = nullptr;
  SettingMap from_environment;
  std::mutex settings_mutex;
  Settings settings;
  ggml_backend_device device{};
  ggml_backend_reg registry{};
};

// Never destroyed, as its backends and buffers may outlive every destructor of a global.
Globals& globals() {
  static auto* const kGlobals = new Globals;
  return *kGlobals;
}

// Settings for the KV caches made from now on, in place of those of an earlier call: lines of
// "name=value" over the environment's. Returns nullptr, or what was wrong, valid until the thread's
// next call.
const char* configure(const char* lines) {
  thread_local std::string error;
  Globals& all = globals();
  Expected<SettingMap> given = settings_from_lines(lines);
  if (!given) {
    error = given.error().message;
    return error.c_str();
  }
  if (given->count("force-isa") != 0) {
    error = "force-isa: the kernels are chosen when the library is loaded; set " +
            variable_name("force-isa") + " before";
    return error.c_str();
  }
  SettingMap values = all.from_environment;
  for (auto& [name, value] : *given) {
    values[name] = std::move(value);
  }
  Expected<Settings> settings = make_settings(values);
  if (!settings) {
    error = settings.error().message;
    return error.c_str();
  }
  const std::lock_guard lock(all.settings_mutex);
  all.settings = std::move(*settings);
  return nullptr;
}

// Valid until the thread's next call.
const char* json_report() {
  thread_local std::string json;
  json = report_json();
  return json.c_str();
}

void* proc_address(const char* name) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("ggml_backend_set_n_threads")) {
    return reinterpret_cast<void*>(set_n_threads);
  }
  if (is("ggml_backend_set_abort_callback")) {
    return reinterpret_cast<void*>(set_abort_callback);
  }
  if (is("zipcache_report_json")) {
    return reinterpret_cast<void*>(json_report);
  }
  if (is("zipcache_configure")) {
    return reinterpret_cast<void*>(configure);
  }
  return nullptr;
}

struct Plugin {
  static constexpr const char* kName = kDeviceName;
  static ggml_backend_dev_t device() { return ggml::device(); }
  static void* proc_address(const char* name) { return ggml::proc_address(name); }
};

Status set_up(Globals& all) {
  all.host = find_host();
  if (all.host.cpu == nullptr) {
    return unsupported("no CPU backend is loaded, and ZipCache computes with it");
  }
  Expected<SettingMap> values = settings_from_environment(environ);
  if (!values) {
    return values.error();
  }
  Expected<Settings> settings = make_settings(*values);
  if (!settings) {
    return settings.error();
  }
  const auto kernels = kernels::select_kernels(settings->force_isa);
  if (!kernels) {
    return kernels.error();
  }
  all.from_environment = std::move(*values);
  all.settings = std::move(*settings);
  all.kernels = *kernels;
  all.registry = RegistryTable<Plugin>::make();
  all.device = {.iface = device_interface(), .reg = &all.registry, .context = nullptr};
  set_buffer_type_device(&all.device);
  return ok_status();
}

}  // namespace

Expected<ggml_backend_reg_t> make_registry() {
  Globals& all = globals();
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (all.kernels == nullptr) {
    if (Status done = set_up(all); !done) {
      return done.error();
    }
    log_info(policy::describe(*all.settings.policy) + "; " + all.kernels->isa);
  }
  return &all.registry;
}

ggml_backend_dev_t device() { return &globals().device; }

const Host& host() { return globals().host; }

const kernels::KernelTable& kernel_table() { return *globals().kernels; }

Settings current_settings() {
  Globals& all = globals();
  const std::lock_guard lock(all.settings_mutex);
  return all.settings;
}

}  // namespace zipcache::ggml
