#include "processes.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

namespace smp::testing {
namespace {

void WriteAll(int fd, const void* data, size_t bytes) {
  CHECK(write(fd, data, bytes) == static_cast<ssize_t>(bytes));
}

void ReadAll(int fd, void* data, size_t bytes) {
  if (bytes == 0) return;  // it would wait for more than that
  CHECK(recv(fd, data, bytes, MSG_WAITALL) == static_cast<ssize_t>(bytes));
}

}  // namespace

double Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

std::vector<std::string> Process::Exchange(const std::string& mine) {
  std::vector<std::string> all(size);
  const size_t length = mine.size();
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    WriteAll(sockets_[peer], &length, sizeof length);
    WriteAll(sockets_[peer], mine.data(), length);
  }
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    size_t bytes = 0;
    ReadAll(sockets_[peer], &bytes, sizeof bytes);
    all[peer].resize(bytes);
    ReadAll(sockets_[peer], all[peer].data(), bytes);
  }
  return all;
}

void RunProcesses(const char* name, int size, const std::function<void(Process&)>& body,
                  const std::vector<int>& signals) {
  const double start = Now();
  std::vector<std::vector<int>> sockets(size, std::vector<int>(size, -1));
  for (int one = 0; one < size; ++one) {
    for (int other = one + 1; other < size; ++other) {
      int pair[2];
      CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
      sockets[one][other] = pair[0];
      sockets[other][one] = pair[1];
    }
  }
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(kTestSeconds);
      for (int other = 0; other < size; ++other) {
        if (other == rank) continue;
        for (const int fd : sockets[other]) {
          if (fd >= 0) close(fd);
        }
      }
      Process self;
      self.rank = rank;
      self.size = size;
      self.sockets_ = sockets[rank];
      body(self);
      std::exit(0);
    }
    children.push_back(child);
  }
  for (const auto& row : sockets) {
    for (const int fd : row) {
      if (fd >= 0) close(fd);
    }
  }
  bool good = true;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    CHECK(waitpid(children[rank], &status, 0) == children[rank]);
    const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    const int expected = rank < static_cast<int>(signals.size()) ? signals[rank] : 0;
    if (signal == expected && (signal != 0 || WEXITSTATUS(status) == 0)) continue;
    good = false;
    std::cerr << name << ": rank " << rank << " ended with signal " << signal
              << ", exit code " << (signal ? 0 : WEXITSTATUS(status)) << "\n";
  }
  std::printf("%s %s (%.2f s)\n", good ? "ok  " : "FAIL", name, Now() - start);
  std::fflush(stdout);
  if (!good) std::_Exit(1);
}

}  // namespace smp::testing
