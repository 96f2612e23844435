#include "eval/sandbox.h"

#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

namespace zipcache::eval {
namespace {

namespace fs = std::filesystem;

constexpr const char* kProgramName = "program.py";
constexpr uid_t kNobody = 65534;
constexpr rlim_t kMaxProcesses = 64;
constexpr auto kPollInterval = std::chrono::milliseconds(5);
constexpr int kNoPython = 127;

// An empty folder that goes away with its contents.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (fs::temp_directory_path() / "zipcache-XXXXXX").string();
    if (mkdtemp(name.data()) != nullptr) {
      path_ = name;
      chmod(name.c_str(), 0755);  // the program runs as somebody else
    }
  }
  ~ScratchFolder() {
    if (!path_.empty()) {
      std::error_code ignored;
      fs::remove_all(path_, ignored);
    }
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

void limit(int resource, rlim_t value) {
  const rlimit both{value, value};
  setrlimit(static_cast<__rlimit_resource_t>(resource), &both);
}

// In the child; only calls that are safe after fork(). Never returns.
[[noreturn]] void become_python(const char* folder, const SandboxLimits& limits, int network_pipe) {
  setsid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  const bool is_root = geteuid() == 0;
  const bool is_cut_off = unshare(is_root ? CLONE_NEWNET : CLONE_NEWUSER | CLONE_NEWNET) == 0;
  const char has_network = is_cut_off ? 0 : 1;
  if (write(network_pipe, &has_network, 1) != 1 || chdir(folder) != 0) {
    _exit(kNoPython);
  }
  if (is_root && (setgroups(0, nullptr) != 0 || setgid(kNobody) != 0 || setuid(kNobody) != 0)) {
    _exit(kNoPython);
  }
  const int null = open("/dev/null", O_RDWR);
  dup2(null, STDIN_FILENO);
  dup2(null, STDOUT_FILENO);
  dup2(null, STDERR_FILENO);
  for (int file = STDERR_FILENO + 1; file < 1024; ++file) {
    close(file);
  }
  limit(RLIMIT_CPU, static_cast<rlim_t>(std::ceil(limits.seconds)));
  limit(RLIMIT_AS, limits.memory_bytes);
  limit(RLIMIT_FSIZE, limits.file_bytes);
  limit(RLIMIT_NPROC, kMaxProcesses);
  limit(RLIMIT_CORE, 0);
  const char* const arguments[] = {"python3", "-I", "-B", kProgramName, nullptr};
  const char* const environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin", nullptr};
  execvpe(arguments[0], const_cast<char* const*>(arguments), const_cast<char* const*>(environment));
  _exit(kNoPython);
}

// The exit status, or -1 when time ran out and the process had to be killed.
int wait_for(pid_t child, double seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > end) {
      kill(-child, SIGKILL);
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      return -1;
    }
    std::this_thread::sleep_for(kPollInterval);
  }
  kill(-child, SIGKILL);  // whatever it left behind
  return status;
}

}  // namespace

Expected<SandboxResult> run_python(const std::string& program, const SandboxLimits& limits) {
  const ScratchFolder folder;
  int pipe_ends[2];
  if (folder.path().empty() || pipe2(pipe_ends, O_CLOEXEC) != 0) {
    return unsupported(std::string("no scratch folder to run a program in: ") +
                       std::strerror(errno));
  }
  const std::string path = folder.path().string();
  std::ofstream(folder.path() / kProgramName) << program;
  const pid_t child = fork();
  if (child == 0) {
    become_python(path.c_str(), limits, pipe_ends[1]);
  }
  close(pipe_ends[1]);
  SandboxResult result;
  char has_network = 1;
  const bool was_told = child > 0 && read(pipe_ends[0], &has_network, 1) == 1;
  close(pipe_ends[0]);
  if (child < 0) {
    return unsupported(std::string("can't run a program: ") + std::strerror(errno));
  }
  const int status = wait_for(child, limits.seconds);
  if (!was_told || (status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == kNoPython)) {
    return unsupported("can't run a program: no python3, or it can't be limited");
  }
  result.succeeded = status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  result.has_network = has_network != 0;
  return result;
}

}  // namespace zipcache::eval
