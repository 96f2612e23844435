// Replays a corpus through a fuzz target without libFuzzer, so that any compiler can run it as an
// ordinary test:  fuzz_target FILE_OR_DIRECTORY...

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

bool replay(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    return false;
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  size_t n_replayed = 0;
  for (int arg = 1; arg < argc; ++arg) {
    const std::filesystem::path path(argv[arg]);
    if (!std::filesystem::is_directory(path)) {
      if (!replay(path)) {
        return 1;
      }
      ++n_replayed;
      continue;
    }
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path)) {
      if (entry.is_regular_file()) {
        if (!replay(entry.path())) {
          return 1;
        }
        ++n_replayed;
      }
    }
  }
  std::printf("replayed %zu inputs\n", n_replayed);
  // An empty corpus would be a test that cannot fail.
  return n_replayed > 0 ? 0 : 1;
}
