// The two symbols that ggml looks up in a backend library. Struct layouts of ggml's backend
// interface may change with its minor version, so another one than we were built with is refused.

#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "ggml-backend-impl.h"
#include "ggml.h"
#if defined(ZIPCACHE_CUDA_PLUGIN)
#include "ggml/cuda/cuda_registry.h"
#else
#include "ggml/registry.h"
#endif

namespace {

constexpr std::string_view kGgmlVersion = ZIPCACHE_GGML_VERSION;  // "0.25.3": built with

// "0.25" of "0.25.3-dev"
std::string_view minor_version(std::string_view version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

#if defined(ZIPCACHE_CUDA_PLUGIN)
constexpr auto kMakeRegistry = zipcache::ggml::make_cuda_registry;
#else
constexpr auto kMakeRegistry = zipcache::ggml::make_registry;
#endif

bool is_version_supported() { return minor_version(ggml_version()) == minor_version(kGgmlVersion); }

// Not to the host's log: a program that names our device stops at once when it is missing, often
// before its log is written.
ggml_backend_reg_t refuse(const std::string& reason) {
  std::fprintf(stderr, "zipcache: not loaded: %s\n", reason.c_str());
  return nullptr;
}

}  // namespace

extern "C" {

GGML_BACKEND_API int ggml_backend_score(void) { return 1; }

// nullptr when the plug-in can't be used, after a line that says why; the host goes on without.
GGML_BACKEND_API ggml_backend_reg_t ggml_backend_init(void) {
  if (!is_version_supported()) {
    return refuse("built for ggml " + std::string(minor_version(kGgmlVersion)) + ".x, found " +
                  ggml_version() + "; build ZipCache for this llama.cpp (ZIPCACHE_LLAMA_DIR)");
  }
  try {
    const auto registry = kMakeRegistry();
    return registry ? *registry : refuse(registry.error().message);
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
}

}  // extern "C"
