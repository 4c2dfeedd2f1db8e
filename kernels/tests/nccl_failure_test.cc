// What NcclTransport does when a peer dies, leaves or never comes, when NCCL fails, and
// when it is closed: over fakes of CUDA and NCCL, between real processes.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "gpu_rank.h"

namespace smp::testing {
namespace {

const Status kDied = {Code::kUnavailable, "rank 1 died (test)"};

void Sleep(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

void Die() { raise(SIGKILL); }

// Rank 1 is killed while rank 0 waits for it in all ways; rank 0 is told as Job tells
// it.
void DeathEndsEveryWait(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  int group = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1}, &group).text, "");
  if (self.rank == 1) {
    self.Meet();
    Sleep(0.1);
    Die();
  }
  std::vector<Memory> memory;
  for (int i = 0; i < 6; ++i) memory.emplace_back(2 << 20, i);
  uint64_t reserved_id = 0;
  std::vector<Outcome> waits = {
      gpu.Recv(1, memory[0].Give()), gpu.Recv(1, memory[1].Give(), /*more=*/true),
      gpu.Recv(1, memory[2].Give()), gpu.Reserve(1, &reserved_id),
      gpu.Recv(1, memory[3].Give()), gpu.Send(1, memory[4].Give())};
  Message sum = gpu.To(group, memory[5].Give());
  sum.sum = {sum.buffer.data, kNcclFloat32};
  waits.emplace_back();
  gpu.transport().AllReduce(std::move(sum), waits.back().Handler());
  Outcome joined;
  gpu.transport().Join(reserved_id, gpu.compute(), joined.Handler());
  waits.push_back(joined);
  self.Meet();
  Sleep(0.3);
  for (const Outcome& each : waits) CHECK(!each.IsOver());
  for (int i = 0; i < 3; ++i) CHECK(memory[i].IsKept());
  const double start = Now();
  gpu.transport().Break(1, kDied, /*drain=*/false);
  for (const Outcome& each : waits) CHECK_EQ(each.Await().text, kDied.text);
  // Reported at once; the memory goes when the device has let go of it.
  CHECK(Now() - start < 1);
  for (const Memory& each : memory) {
    CHECK(GpuRank::Eventually([&] { return !each.IsKept(); }));
  }
  CHECK_EQ(gpu.Recv(1, Memory(4, 0).Give()).Await().text, kDied.text);
  CHECK_EQ(gpu.Send(1, Memory(4, 0).Give()).Await().text, kDied.text);
  Synchronize(gpu.compute());
  CHECK_EQ(Fakes().NcclCounts().aborts, 3);
  CHECK(gpu.failures().empty());  // who told it knows
}

// CUDA frees the memory of a communicator only when all streams are done, and on one of
// them rank 0 waits for rank 2, which sends when it hears that rank 1's messages ended.
void OtherLanesGoOn(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank == 1) {
    self.Meet();
    Die();
  }
  const int other = 2 - self.rank;
  Memory memory(1000, 0);
  Outcome received;
  std::vector<Outcome> lost;
  if (self.rank == 0) {
    received = gpu.Recv(2, memory.buffer());
    lost = {gpu.Recv(1, Memory(1000, 0).Give()),
            gpu.Send(1, Memory(2 << 20, 0).Give())};
  }
  self.Meet();
  gpu.transport().Break(1, kDied, /*drain=*/false);
  for (const Outcome& each : lost) CHECK_EQ(each.Await().text, kDied.text);
  Sleep(0.1);  // the communicators are being given up
  std::vector<Memory> later;
  std::vector<Outcome> outcomes;
  if (self.rank == 2) outcomes.push_back(gpu.Send(0, Memory(1000, 3).Give()));
  for (int i = 0; i < 3; ++i) {
    later.emplace_back(50000, 0);
    outcomes.push_back(gpu.Send(other, Memory(50000, i).Give()));
    outcomes.push_back(gpu.Recv(other, later.back().buffer()));
  }
  for (const Outcome& each : outcomes) CHECK_EQ(each.Await().text, "");
  for (int i = 0; i < 3; ++i) CHECK(later[i].Text() == Memory::Pattern(50000, i));
  if (self.rank == 0) {
    CHECK_EQ(received.Await().text, "");
    CHECK(memory.Text() == Memory::Pattern(1000, 3));
  }
  // Not Meet: rank 1 is no more.
  Outcome last = self.rank == 0 ? gpu.Send(2, Memory(1, 0).Give())
                                : gpu.Recv(0, Memory(1, 0).Give());
  CHECK_EQ(last.Await().text, "");
}

// What was given up keeps the device for a while, on account of a receive that waits
// for another rank; that one's death must end it all the same.
void OneDeathAfterTheOther(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank != 0) {
    self.Meet();
    Die();
  }
  const Outcome first = gpu.Recv(1, Memory(1000, 0).Give());
  const Outcome second = gpu.Recv(2, Memory(1000, 0).Give());
  self.Meet();
  gpu.transport().Break(1, kDied, /*drain=*/false);
  CHECK_EQ(first.Await().text, kDied.text);
  Sleep(0.2);
  gpu.transport().Break(2, {Code::kUnavailable, "rank 2 died, too"}, /*drain=*/false);
  CHECK_EQ(second.Await().text, "rank 2 died, too");
  CHECK(GpuRank::Eventually([] { return Fakes().NcclCounts().communicators == 0; }));
}

// The thread of the transport may be inside of CUDA, which waits for what is to be
// given up. Here it is inside of a callback.
void TheEndNeedsNoThread(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank != 0) {
    if (self.rank == 2) CHECK_EQ(gpu.Send(0, Memory(10, 0).Give()).Await().text, "");
    self.Meet();
    self.Meet();
    return;
  }
  Outcome inside, go_on;
  gpu.transport().Recv(gpu.To(2, Memory(10, 0).Give()),
                       [enter = inside.Handler(), go_on](const Status&) {
                         enter({});
                         go_on.Await();
                       });
  const Outcome lost = gpu.Recv(1, Memory(1000, 0).Give());
  inside.Await();
  self.Meet();
  gpu.transport().Break(1, kDied, /*drain=*/false);
  CHECK_EQ(lost.Await().text, kDied.text);
  CHECK(GpuRank::Eventually([] { return Fakes().NcclCounts().aborts == 2; }));
  go_on.Handler()({});
  self.Meet();
}

void ALeaverIsDrained(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  std::vector<Outcome> outcomes;
  if (self.rank == 1) {
    for (int i = 0; i < 5; ++i)
      outcomes.push_back(gpu.Send(0, Memory(300000, i).Give()));
    self.Meet();
    CHECK(gpu.transport().WaitForSends(20));
    for (const Outcome& each : outcomes) CHECK_EQ(each.Await().text, "");
    self.Meet();
  } else {
    std::vector<Memory> memory;
    for (int i = 0; i < 6; ++i) {
      memory.emplace_back(300000, 0);
      outcomes.push_back(gpu.Recv(1, memory.back().buffer()));
    }
    self.Meet();
    self.Meet();
    gpu.transport().Break(1, {Code::kUnavailable, "rank 1 left the job"}, true);
    CHECK_EQ(outcomes.back().Await().text, "rank 1 left the job");
    for (int i = 0; i < 5; ++i) {
      CHECK_EQ(outcomes[i].Await().text, "");
      CHECK(memory[i].Text() == Memory::Pattern(300000, i));
    }
    CHECK_EQ(gpu.Recv(1, Memory(4, 0).Give()).Await().text, "rank 1 left the job");
  }
  self.Meet();
}

// It has sent all and goes; the stream of rank 0 comes to its messages a while later.
void ASlowRankStillReceives(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank == 1) {
    for (int i = 0; i < 2; ++i) {
      CHECK_EQ(gpu.Send(0, Memory(1000, i).Give()).Await().text, "");
    }
    self.Meet();
  } else {
    Memory first(1000, 7), second(1000, 7);
    Gate gate(gpu.compute());
    std::vector<Outcome> outcomes = {gpu.Recv(1, first.buffer())};
    self.Meet();
    gpu.transport().Break(1, {Code::kUnavailable, "rank 1 left the job"}, true);
    outcomes.push_back(gpu.Recv(1, second.buffer()));
    Sleep(1.5);
    for (const Outcome& each : outcomes) CHECK(!each.IsOver());
    gate.Open();
    for (const Outcome& each : outcomes) CHECK_EQ(each.Await().text, "");
    CHECK(first.Text() == Memory::Pattern(1000, 0));
    CHECK(second.Text() == Memory::Pattern(1000, 1));
    CHECK_EQ(gpu.Recv(1, Memory(4, 0).Give()).Await().text, "rank 1 left the job");
  }
  self.Meet();
}

// Of which NCCL's own threads know first.
void AsynchronousErrorsNameThePeer(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  Memory memory(1000, 0);
  const Outcome waiting = gpu.Recv(peer, memory.Give());
  Sleep(0.05);
  CHECK(gpu.failures().empty());
  Fakes().inject(6);
  CHECK_EQ(waiting.Await().text,
           "a connection of NCCL failed: NCCL: remote process exited or there was a "
           "network error (6)");
  const auto failures = gpu.failures();
  CHECK_EQ(failures.size(), 1u);
  CHECK_HAS(failures[0], "messages from rank " + std::to_string(peer) +
                             ": a connection of NCCL failed");
  CHECK(GpuRank::Eventually([&] { return !memory.IsKept(); }));
  CHECK_HAS(gpu.Recv(peer, Memory(4, 0).Give()).Await().text, "network error (6)");
  self.Meet();
}

// All ranks of a group have an error; one of them has died, and that is told next.
void ADeathExplainsErrors(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  int group = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1, 2}, &group).text, "");
  Memory memory(1000, 0);
  const auto sum = [&] {
    Message message = gpu.To(group, memory.buffer());
    message.sum = {message.buffer.data, kNcclFloat32};
    Outcome outcome;
    gpu.transport().AllReduce(std::move(message), outcome.Handler());
    return outcome;
  };
  if (self.rank == 1) {
    self.Meet();
    Die();
  }
  const Outcome running = sum();
  const Outcome from_other = gpu.Recv(2 - self.rank, Memory(4, 0).Give());
  self.Meet();
  Fakes().inject(6);
  Sleep(0.2);  // it is noticed within 0.1 s, and told after another second
  const Outcome waiting = sum();
  CHECK(!running.IsOver() && !waiting.IsOver());
  gpu.transport().Break(1, kDied, /*drain=*/false);
  CHECK_EQ(running.Await().text, kDied.text);
  CHECK_EQ(waiting.Await().text, kDied.text);
  CHECK_HAS(from_other.Await().text, "network error (6)");
  // That one nobody has explained.
  CHECK_EQ(gpu.failures().size(), 1u);
  CHECK_HAS(gpu.failures()[0], "messages from rank " + std::to_string(2 - self.rank));
}

void ErrorsNameTheGroup(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  int group = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1, 2}, &group).text, "");
  Fakes().refuse(5);
  Memory memory(1000, 0);
  Message message = gpu.To(group, memory.Give());
  message.sum = {message.buffer.data, kNcclFloat32};
  Outcome outcome;
  gpu.transport().AllReduce(std::move(message), outcome.Handler());
  CHECK_EQ(outcome.Await().text, "ncclAllReduce: NCCL: invalid usage (5)");
  CHECK_EQ(gpu.failures().size(), 1u);
  CHECK_EQ(gpu.failures()[0],
           "sums of ranks 0, 1, 2: ncclAllReduce: NCCL: invalid usage (5)");
  self.Meet();
}

void RefusedOperations(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  Fakes().refuse(5);
  Memory first(1000, 0), second(1000, 0);
  const Outcome one = gpu.Recv(peer, first.Give(), /*more=*/true);
  const Outcome other = gpu.Recv(peer, second.Give());
  CHECK_EQ(one.Await().text, "ncclRecv: NCCL: invalid usage (5)");
  CHECK_EQ(other.Await().text, "ncclRecv: NCCL: invalid usage (5)");
  CHECK_EQ(gpu.failures().size(), 1u);
  CHECK_HAS(gpu.failures()[0], "messages from rank " + std::to_string(peer) + ": ");
  CHECK(GpuRank::Eventually([&] { return !first.IsKept() && !second.IsKept(); }));
  self.Meet();
}

// Who waits for a message hears that it was refused, not that there is data.
void RefusedOperationsAreNotJoined(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  uint64_t id = 0;
  const Outcome reserved = gpu.Reserve(peer, &id);
  Outcome joined;
  gpu.transport().Join(id, gpu.compute(), joined.Handler());
  Fakes().refuse(5);
  Memory memory(1000, 0);
  gpu.transport().Fill(id, memory.buffer());
  CHECK_EQ(joined.Await().text, "ncclRecv: NCCL: invalid usage (5)");
  CHECK_EQ(reserved.Await().text, "ncclRecv: NCCL: invalid usage (5)");
  self.Meet();
}

void CancelEndsTheDirection(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  if (self.rank == 0) {
    Memory memory(1000, 0), behind(1000, 0);
    Message message = gpu.To(peer, memory.Give());
    const uint64_t id = message.id;
    Outcome cancelled;
    gpu.transport().Recv(std::move(message), cancelled.Handler());
    const Outcome next = gpu.Recv(peer, behind.Give());
    gpu.transport().Cancel(id, {Code::kDeadline, "timeout_s=1"});
    CHECK_EQ(cancelled.Await().text, "timeout_s=1");
    CHECK(cancelled.Await().code == Code::kDeadline);
    CHECK_EQ(next.Await().text,
             "one of the messages from rank 1 was given up, and with it those behind "
             "it: timeout_s=1");
    CHECK(GpuRank::Eventually([&] { return !memory.IsKept() && !behind.IsKept(); }));
    gpu.transport().Cancel(id, kDied);  // over: nothing happens
  }
  self.Meet();
  // The other direction still works.
  Memory memory(1000, 5);
  const Outcome last =
      self.rank == 0 ? gpu.Send(1, memory.buffer()) : gpu.Recv(0, memory.buffer());
  CHECK_EQ(last.Await().text, "");
  self.Meet();
}

void ClosesWithMessagesUnderWay(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  std::vector<Memory> memory;
  for (int i = 0; i < 4; ++i) memory.emplace_back(2 << 20, 0);
  uint64_t reserved_id = 0;
  const std::vector<Outcome> outcomes = {
      gpu.Send(peer, memory[0].Give()), gpu.Send(peer, memory[1].Give(), true),
      gpu.Reserve(peer, &reserved_id), gpu.Recv(peer, memory[2].Give(), true),
      gpu.Recv(peer, memory[3].Give())};
  self.Meet();
  const double start = Now();
  gpu.transport().Close(0.1);
  CHECK(Now() - start < 5);
  for (const Outcome& each : outcomes) {
    CHECK_EQ(each.Await().text, "this rank has left the job");
  }
  for (const Memory& each : memory) CHECK(!each.IsKept());
  CHECK_EQ(gpu.Send(peer, Memory(4, 0).Give()).Await().text,
           "this rank has left the job");
  self.Meet();
}

// As the handler of exit() does: in a hurry, and without freeing anything.
void ExitsWithMessagesUnderWay(Process& self) {
  auto* const gpu = new GpuRank(self);
  gpu->Connect();
  const Outcome waiting = gpu->Recv(1 - self.rank, Memory(1000, 0).Give());
  const double start = Now();
  gpu->transport().CloseAtExit();
  CHECK(Now() - start < 5);
  std::exit(0);
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunProcesses("GPU: death ends every wait", 2, DeathEndsEveryWait, {0, SIGKILL});
  RunProcesses("GPU: other lanes go on", 3, OtherLanesGoOn, {0, SIGKILL, 0});
  RunProcesses("GPU: one death after the other", 3, OneDeathAfterTheOther,
               {0, SIGKILL, SIGKILL});
  RunProcesses("GPU: the end needs no thread", 3, TheEndNeedsNoThread);
  RunProcesses("GPU: a leaver is drained", 2, ALeaverIsDrained);
  RunProcesses("GPU: a slow rank still receives", 2, ASlowRankStillReceives);
  RunProcesses("GPU: asynchronous errors name the peer", 2,
               AsynchronousErrorsNameThePeer);
  RunProcesses("GPU: a death explains errors", 3, ADeathExplainsErrors,
               {0, SIGKILL, 0});
  RunProcesses("GPU: errors name the group", 3, ErrorsNameTheGroup);
  RunProcesses("GPU: refused operations", 2, RefusedOperations);
  RunProcesses("GPU: refused operations are not joined", 2,
               RefusedOperationsAreNotJoined);
  RunProcesses("GPU: cancel ends the direction", 2, CancelEndsTheDirection);
  RunProcesses("GPU: closes with messages under way", 2, ClosesWithMessagesUnderWay);
  RunProcesses("GPU: exits with messages under way", 2, ExitsWithMessagesUnderWay);
}
