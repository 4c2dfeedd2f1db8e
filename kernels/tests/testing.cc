#include "testing.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>

namespace smp::testing {
namespace {

constexpr unsigned kTestSeconds = 60;  // a hang must not outlive this

void WriteAll(int fd, const void* data, size_t bytes) {
  CHECK(write(fd, data, bytes) == static_cast<ssize_t>(bytes));
}

void ReadAll(int fd, void* data, size_t bytes) {
  CHECK(recv(fd, data, bytes, MSG_WAITALL) == static_cast<ssize_t>(bytes));
}

}  // namespace

double Now() {
  return std::chrono::duration<double>(Watch::Clock::now().time_since_epoch()).count();
}

Buffer TextBuffer(const std::string& text) {
  auto owner = std::make_shared<std::string>(text);
  return {owner->data(), owner->size(), owner};
}

Status Await(Job& job, const TicketPtr& ticket) {
  job.mailbox().Wait(ticket, [](const Status&) {});
  CHECK(ticket->WaitFor(kTestSeconds));
  return ticket->status();
}

std::vector<std::string> Rank::Exchange(const std::string& mine) {
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

void Rank::Meet() { Exchange("here"); }

Status Rank::Join(std::unique_ptr<Job>* job) {
  const Status status = JoinWithoutStart(job);
  return status.ok() ? (*job)->Start() : status;
}

Status Rank::JoinWithoutStart(std::unique_ptr<Job>* job) {
  *job = std::make_unique<Job>(options);
  std::string address;
  Status status = (*job)->Open(&address);
  if (!status.ok()) return status;
  const auto addresses = Exchange(address);
  for (int peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    status = (*job)->Connect(peer, addresses[peer].data());
    if (!status.ok()) return status;
  }
  return {};
}

void Rank::Send(Job& job, int peer, uint32_t channel, const std::string& text) {
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  const Status status = job.mailbox().PostSend(route, nullptr, TextBuffer(text));
  CHECK_EQ(status.text, "");
}

std::string Rank::Recv(Job& job, int peer, uint32_t channel, size_t bytes) {
  auto text = std::make_shared<std::string>(bytes, '?');
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  const Buffer buffer = {text->data(), bytes, text};
  const Status status = Await(job, job.mailbox().Recv(route, Part::kPayload, buffer));
  CHECK_EQ(status.text, "");
  return *text;
}

Status Rank::TryRecv(Job& job, int peer, uint32_t channel, size_t bytes) {
  auto route = std::make_shared<Route>(Route{peer, channel, "text"});
  return Await(job, job.mailbox().Recv(route, Part::kPayload,
                                       TextBuffer(std::string(bytes, '?'))));
}

void RunRanks(const char* name, int size, const std::function<void(Rank&)>& body,
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
      Rank self;
      self.rank = rank;
      self.size = size;
      self.sockets_ = sockets[rank];
      self.options.rank = rank;
      self.options.size = size;
      self.options.timeout_seconds = kTestSeconds;
      self.options.job_id = "a test";
      self.options.net_devices = "lo";
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
