// What the others see when a rank dies, fails, stops, leaves, or is a stranger.
#include <dirent.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "testing.h"

namespace smp::testing {
namespace {

using JobPtr = std::unique_ptr<Job>;

constexpr size_t kLarge = 4 << 20;
// A death is seen within 100 ms where nothing else runs; tests share their machine.
constexpr double kSeenSeconds = 2;

void Kill(const JobPtr&) { raise(SIGKILL); }

RoutePtr To(int peer, uint32_t channel) {
  return std::make_shared<Route>(Route{peer, channel, "h"});
}

// Everything that waits for the dead rank ends, and so does what is asked later.
void DeathEndsEveryWait(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int victim = 1;
  if (self.rank == victim) {
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    Kill(job);
  }
  Mailbox& box = job->mailbox();
  std::vector<TicketPtr> waits;
  waits.push_back(box.Recv(To(victim, 1), Part::kPayload, TextBuffer("????")));
  waits.push_back(box.Recv(To(victim, 2), Part::kHeader, TextBuffer("????")));
  waits.push_back(box.Send(To(victim, 3), TextBuffer(std::string(kLarge, 's')), false));
  waits.push_back(box.Send(To(victim, 4), TextBuffer("text"), true));
  CHECK(
      box.PostSend(To(victim, 5), nullptr, TextBuffer(std::string(kLarge, 's'))).ok());
  waits.push_back(box.Flush());
  self.Meet();
  const double start = Now();
  for (const TicketPtr& ticket : waits) {
    const Status status = Await(*job, ticket);
    CHECK(status.code == Code::kUnavailable);
    CHECK_HAS(status.text, "rank 1 died (");
    CHECK_HAS(status.text, "rank 1, channel ");
  }
  CHECK(Now() - start < 0.3 + kSeenSeconds);
  CHECK_HAS(self.TryRecv(*job, victim, 6).text, "rank 1 died (");
  CHECK_HAS(box.PostSend(To(victim, 7), nullptr, TextBuffer("text")).text,
            "rank 1 died (");
  std::string failure;
  CHECK(job->Failure(&failure));
  CHECK_EQ(failure.find("rank 1 died ("), 0u);
  CHECK(job->Close(20).ok());
  CHECK(Now() - start < 5);
}

// In the middle of a transfer: of many large messages, some have arrived.
void DeathDuringTransfers(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  const int peer = 1 - self.rank;
  for (uint32_t i = 0; i < 32; ++i) {
    job->mailbox().PostSend(To(peer, i), nullptr, TextBuffer(std::string(kLarge, 's')));
  }
  std::thread killer;
  if (self.rank == 1) killer = std::thread([] { usleep(15000), raise(SIGKILL); });
  for (uint32_t i = 0; i < 32; ++i) {
    const Status status = self.TryRecv(*job, peer, i, kLarge);
    if (!status.ok()) CHECK_HAS(status.text, "rank 1 died (");
  }
  if (self.rank == 1) killer.join();
  CHECK_HAS(self.TryRecv(*job, 1, 99).text, "rank 1 died (");
  CHECK(job->Close(20).ok());
}

// Each waits for the next one, and dies of what it is told: all name the first.
void SurvivorsNameTheFirst(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  self.Meet();
  if (self.rank == 3) Kill(job);
  CHECK_HAS(self.TryRecv(*job, (self.rank + 1) % self.size, 1).text, "rank 3 died (");
  std::_Exit(0);
}

// Ranks without memory in common are on different hosts: they say that they are alive,
// and of a death the link may be the cause.
void DeathOnAnotherHost(Rank& self) {
  setenv("UCX_TLS", "tcp", 1);
  self.options.silence_seconds = 0.6;
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  usleep(1000000);  // ten words to the other one
  std::string failure;
  CHECK(!job->Failure(&failure));
  self.Meet();
  if (self.rank == 1) Kill(job);
  CHECK_HAS(self.TryRecv(*job, 1, 1).text, "rank 1 died or is cut off (");
}

void AbortCarriesItsReason(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  self.Meet();
  if (self.rank == 2) {
    const double start = Now();
    job->Abort("ValueError: bad batch");
    CHECK(Now() - start < 1);
    std::_Exit(0);
  }
  // Rank 0 waits for rank 1, which has done nothing wrong.
  const Status status = self.TryRecv(*job, self.rank + 1, 1);
  CHECK_EQ(status.text,
           "rank 2 failed: ValueError: bad batch: receive of text from rank " +
               std::to_string(self.rank + 1) + ", channel 1, step 0");
  job->Abort("because of rank 2");  // the first reason stays
  std::string failure;
  CHECK(job->Failure(&failure));
  CHECK_EQ(failure, "rank 2 failed: ValueError: bad batch");
  CHECK(job->Close(20).ok());
}

void LeavingIsNoDeath(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  if (self.rank == 1) {
    self.Send(*job, 0, 1, "last words");
    self.Send(*job, 0, 2, std::string(kLarge, 's'));  // is waited for
    CHECK(job->Close(1).ok());
    std::_Exit(0);
  }
  const TicketPtr never =
      job->mailbox().Recv(To(1, 3), Part::kPayload, TextBuffer("????"));
  CHECK(self.Recv(*job, 1, 2, kLarge) == std::string(kLarge, 's'));
  CHECK_EQ(Await(*job, never).text,
           "rank 1 left the job: receive of h from rank 1, channel 3, step 0");
  // What has arrived can still be had; what has not, never will.
  CHECK_EQ(self.Recv(*job, 1, 1, 10), "last words");
  CHECK_HAS(self.TryRecv(*job, 1, 4).text, "rank 1 left the job");
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  std::string failure;
  CHECK(!job->Failure(&failure));
  CHECK(job->Close(20).ok());
}

// exit() without Close, through the C API's atexit handler.
void ExitIsALeave(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  if (self.rank == 1) {
    SetCurrentJob(std::move(job));
    std::exit(0);
  }
  CHECK_HAS(self.TryRecv(*job, 1, 3).text, "rank 1 left the job");
  std::string failure;
  CHECK(!job->Failure(&failure));
  CHECK(job->Close(20).ok());
}

void AStoppedRankMeetsTheDeadline(Rank& self) {
  self.options.timeout_seconds = 1;
  self.options.stall_seconds = 0.3;
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  int pid = getpid();
  if (self.rank == 1) {
    self.Send(*job, 0, 1, std::string(reinterpret_cast<char*>(&pid), sizeof pid));
    raise(SIGSTOP);  // rank 0 kills it in the end
  }
  const std::string bytes = self.Recv(*job, 1, 1, sizeof pid);
  std::memcpy(&pid, bytes.data(), sizeof pid);
  const double start = Now();
  const Status status = self.TryRecv(*job, 1, 2);
  CHECK(status.code == Code::kDeadline);
  CHECK_HAS(status.text, "timeout_s=1 s");
  CHECK(Now() - start > 0.9 && Now() - start < 3);
  job->mailbox().PostSend(To(1, 3), nullptr, TextBuffer(std::string(kLarge, 's')));
  CHECK(Await(*job, job->mailbox().Flush()).code == Code::kDeadline);
  CHECK(job->Close(0.5).ok());
  kill(pid, SIGKILL);
}

void AStrangerIsRefused(Rank& self) {
  if (self.rank == 1) self.options.job_id = "another";
  JobPtr job;
  const Status status = self.Join(&job);
  CHECK(status.code == Code::kUnavailable);
  CHECK_HAS(status.text, "refused the handshake");
  self.Meet();
}

void AMissingRankIsNamed(Rank& self) {
  self.options.timeout_seconds = 1;
  JobPtr job;
  if (self.rank == 2) {
    // Has an address, but never says hello.
    self.JoinWithoutStart(&job);
    self.Meet();
    std::_Exit(0);
  }
  const Status status = self.Join(&job);
  CHECK(status.code == Code::kDeadline);
  CHECK_EQ(status.text, "no handshake with rank 2 within timeout_s=1");
  self.Meet();
}

// What UCX may have left: files of its own, and segments that nobody has attached.
// Other programs of the machine come and go meanwhile.
std::set<std::string> LeftSharedMemory() {
  std::set<std::string> names;
  if (DIR* directory = opendir("/dev/shm")) {
    while (const dirent* entry = readdir(directory)) {
      const std::string name = entry->d_name;
      if (name.rfind("ucx", 0) == 0) names.insert("/dev/shm/" + name);
    }
    closedir(directory);
  }
  std::ifstream segments("/proc/sysvipc/shm");
  std::string line;
  std::getline(segments, line);  // the heading
  while (std::getline(segments, line)) {
    std::istringstream columns(line);
    long key, id, mode, bytes, creator, last, attached = -1;
    columns >> key >> id >> mode >> bytes >> creator >> last >> attached;
    if (attached == 0) names.insert("System V segment " + std::to_string(id));
  }
  return names;
}

void DiesWithMessagesUnderWay(Rank& self) {
  JobPtr job;
  CHECK_EQ(self.Join(&job).text, "");
  for (const size_t bytes : {size_t{10}, size_t{10000}, kLarge}) {
    job->mailbox().PostSend(To(1 - self.rank, 1), nullptr,
                            TextBuffer(std::string(bytes, 's')));
  }
  self.Meet();
  Kill(job);
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  const auto before = LeftSharedMemory();
  RunRanks("death ends every wait", 3, DeathEndsEveryWait, {0, SIGKILL, 0});
  RunRanks("death during transfers", 2, DeathDuringTransfers, {0, SIGKILL});
  RunRanks("survivors name the first", 4, SurvivorsNameTheFirst, {0, 0, 0, SIGKILL});
  RunRanks("death on another host", 2, DeathOnAnotherHost, {0, SIGKILL});
  RunRanks("abort carries its reason", 3, AbortCarriesItsReason);
  RunRanks("leaving is no death", 2, LeavingIsNoDeath);
  RunRanks("exit is a leave", 2, ExitIsALeave);
  RunRanks("a stopped rank meets the deadline", 2, AStoppedRankMeetsTheDeadline,
           {0, SIGKILL});
  RunRanks("a stranger is refused", 2, AStrangerIsRefused);
  RunRanks("a missing rank is named", 3, AMissingRankIsNamed);
  RunRanks("death with messages under way", 2, DiesWithMessagesUnderWay,
           {SIGKILL, SIGKILL});
  for (const std::string& name : LeftSharedMemory()) {
    if (before.count(name)) continue;
    std::cerr << "left behind: " << name << "\n";
    return 1;
  }
  std::puts("ok   no shared memory is left behind");
}
