#include <algorithm>

#include "cuda_bench.h"
#include "device_memory.h"

namespace zipcache::cuda {

Timing time_graph(int n_launches, int n_samples,
                  const std::function<void(int, cudaStream_t)>& launch) {
  cudaStream_t stream;
  REQUIRE(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int n = 0; n < n_launches; ++n) {
    launch(n, stream);
  }
  REQUIRE(cudaStreamEndCapture(stream, &graph));
  REQUIRE(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  REQUIRE(cudaEventCreate(&begin));
  REQUIRE(cudaEventCreate(&end));
  std::vector<double> times;
  for (int sample = -3; sample < n_samples; ++sample) {
    REQUIRE(cudaEventRecord(begin, stream));
    REQUIRE(cudaGraphLaunch(exec, stream));
    REQUIRE(cudaEventRecord(end, stream));
    REQUIRE(cudaEventSynchronize(end));
    float ms = 0;
    REQUIRE(cudaEventElapsedTime(&ms, begin, end));
    if (sample >= 0) {
      times.push_back(ms * 1e-3 / n_launches);
    }
  }
  std::ranges::sort(times);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return {times[times.size() / 2], times[times.size() / 10], times[times.size() * 9 / 10]};
}

void Report::line(const char* bench, const std::string& shape, double bytes, const Timing& t,
                  const std::string& extra) const {
  const double rate = bytes / t.median;
  std::printf("%-10s %-34s %9.2f us [%7.2f %7.2f] %8.1f MB %7.0f GB/s %5.1f%% of read %s\n", bench,
              shape.c_str(), t.median * 1e6, t.p10 * 1e6, t.p90 * 1e6, bytes * 1e-6, rate * 1e-9,
              read_bytes_per_s > 0 ? 100 * rate / read_bytes_per_s : 100.0, extra.c_str());
  std::fflush(stdout);
  if (json != nullptr) {
    std::fprintf(json,
                 "{\"bench\":\"%s\",\"shape\":\"%s\",\"seconds\":%.4g,\"seconds_p10\":%.4g,"
                 "\"seconds_p90\":%.4g,\"bytes\":%.0f,\"bytes_per_s\":%.5g,"
                 "\"read_bytes_per_s\":%.5g,\"copy_bytes_per_s\":%.5g,\"of_read\":%.4f,"
                 "\"device\":\"%s\"}\n",
                 bench, shape.c_str(), t.median, t.p10, t.p90, bytes, rate, read_bytes_per_s,
                 copy_bytes_per_s, read_bytes_per_s > 0 ? rate / read_bytes_per_s : 1.0,
                 device.c_str());
    std::fflush(json);
  }
}

}  // namespace zipcache::cuda
