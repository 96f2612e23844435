#include "ggml/host.h"

#include <cstring>

#include "ggml-backend.h"

namespace zipcache::ggml {
namespace {

template <typename Function>
void find_function(ggml_backend_reg_t registry, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(registry, name));
}

bool has_feature(ggml_backend_reg_t registry, const char* name) {
  ggml_backend_get_features_t get_features = nullptr;
  find_function(registry, "ggml_backend_get_features", &get_features);
  if (get_features == nullptr) {
    return false;
  }
  for (const ggml_backend_feature* feature = get_features(registry); feature->name != nullptr;
       ++feature) {
    if (std::strcmp(feature->name, name) == 0) {
      return true;
    }
  }
  return false;
}

}  // namespace

Host find_host() {
  Host host;
  host.cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (host.cpu == nullptr) {
    return host;
  }
  ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(host.cpu);
  find_function(registry, "ggml_backend_set_n_threads", &host.set_n_threads);
  find_function(registry, "ggml_backend_set_abort_callback", &host.set_abort_callback);
  find_function(registry, "ggml_threadpool_new", &host.threadpool_new);
  find_function(registry, "ggml_threadpool_free", &host.threadpool_free);
  find_function(registry, "ggml_backend_cpu_set_threadpool", &host.set_threadpool);
  host.has_openmp = has_feature(registry, "OPENMP");

  ggml_backend_dev_get_extra_bufts_t extra = nullptr;
  find_function(registry, "ggml_backend_dev_get_extra_bufts", &extra);
  if (extra != nullptr) {
    host.extra_buffer_types = extra(host.cpu);
  }
  return host;
}

CpuBackend::CpuBackend(const Host& host)
    : host_(host), backend_(ggml_backend_dev_init(host.cpu, nullptr)) {}

CpuBackend::~CpuBackend() {
  backend_.reset();
  if (pool_ != nullptr) {
    host_.threadpool_free(pool_);
  }
}

void CpuBackend::set_n_threads(int n_threads) {
  if (host_.set_n_threads != nullptr) {
    host_.set_n_threads(backend_.get(), n_threads);
  }
  const bool can_pool = host_.threadpool_new != nullptr && host_.threadpool_free != nullptr &&
                        host_.set_threadpool != nullptr;
  // A pool serves any smaller number of threads too, so it only ever grows.
  if (host_.has_openmp || !can_pool || n_threads <= pool_threads_) {
    return;
  }
  ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
  ggml_threadpool_t pool = host_.threadpool_new(&params);
  host_.set_threadpool(backend_.get(), pool);
  if (pool_ != nullptr) {
    host_.threadpool_free(pool_);
  }
  pool_ = pool;
  pool_threads_ = n_threads;
}

void CpuBackend::set_abort_callback(ggml_abort_callback callback, void* data) {
  if (host_.set_abort_callback != nullptr) {
    host_.set_abort_callback(backend_.get(), callback, data);
  }
}

}  // namespace zipcache::ggml
