// What messages between GPUs wait for, and who waits for them: streams, memory, order.
#include <chrono>
#include <cstring>
#include <thread>

#include "gpu_rank.h"

namespace smp::testing {
namespace {

void SendsWaitForTheirStream(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  Memory memory(100000, self.rank == 0 ? 1 : 0);
  if (self.rank == 0) {
    Gate gate(gpu.compute());
    PutOnStream(gpu.compute(), [&memory] {
      const std::string text = Memory::Pattern(100000, 2);
      std::memcpy(memory.buffer().data, text.data(), text.size());
    });
    const Outcome sent = gpu.Send(1, memory.buffer());
    // What the stream is given afterwards is not waited for.
    Gate later(gpu.compute());
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(!sent.IsOver());
    gate.Open();
    CHECK_EQ(sent.Await().text, "");
  } else {
    const Outcome received = gpu.Recv(0, memory.buffer());
    self.Meet();
    CHECK_EQ(received.Await().text, "");
    CHECK(memory.Text() == Memory::Pattern(100000, 2));
  }
  self.Meet();
}

void ReceivesWaitForTheirStream(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank == 0) {
    CHECK_EQ(gpu.Send(1, Memory(100000, 2).Give()).Await().text, "");
  } else {
    Memory memory(100000, 1);
    Gate gate(gpu.compute());
    std::string seen;
    PutOnStream(gpu.compute(), [&] { seen = memory.Text(); });
    const Outcome received = gpu.Recv(0, memory.buffer());
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(!received.IsOver());
    gate.Open();
    CHECK_EQ(received.Await().text, "");
    CHECK(seen == Memory::Pattern(100000, 1));
    CHECK(memory.Text() == Memory::Pattern(100000, 2));
  }
  self.Meet();
}

void AJoinedStreamWaits(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  if (self.rank == 0) {
    self.Meet();
    for (int i = 0; i < 2; ++i) {
      CHECK_EQ(gpu.Send(1, Memory(100000, 2).Give()).Await().text, "");
    }
  } else {
    Memory memory(100000, 1), second(100000, 1);
    Message message = gpu.To(0, memory.buffer());
    const uint64_t id = message.id;
    Outcome received, told, reserved_told, told_late;
    gpu.transport().Recv(std::move(message), received.Handler());
    gpu.transport().Join(id, gpu.compute(), told.Handler());
    CHECK_EQ(told.Await().text, "");
    std::string seen, second_seen;
    PutOnStream(gpu.compute(), [&] { seen = memory.Text(); });
    // A stream can join what has no memory yet, but hears of it later.
    uint64_t reserved_id = 0;
    const Outcome reserved = gpu.Reserve(0, &reserved_id);
    gpu.transport().Join(reserved_id, gpu.compute(), [&](const Status& status) {
      PutOnStream(gpu.compute(), [&] { second_seen = second.Text(); });
      reserved_told.Handler()(status);
    });
    CHECK(!reserved_told.IsOver() && !received.IsOver());
    self.Meet();
    CHECK_EQ(received.Await().text, "");
    CHECK(!reserved_told.IsOver());
    gpu.transport().Fill(reserved_id, second.buffer());
    CHECK_EQ(reserved_told.Await().text, "");
    Synchronize(gpu.compute());
    CHECK(seen == Memory::Pattern(100000, 2));
    CHECK(second_seen == Memory::Pattern(100000, 2));
    CHECK_EQ(reserved.Await().text, "");
    gpu.transport().Join(id, gpu.compute(), told_late.Handler());
    CHECK_EQ(told_late.Await().text, "");
  }
  self.Meet();
}

// Not before the message is over, and soon after it.
void OwnersAreReleased(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  Memory memory(2 << 20, 1);
  Message message = gpu.To(1 - self.rank, memory.Give());
  const uint64_t id = message.id;
  Outcome outcome;
  if (self.rank == 0) {
    gpu.transport().Send(std::move(message), outcome.Handler());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(memory.IsKept() && gpu.transport().Holds(id) && !outcome.IsOver());
    self.Meet();
  } else {
    self.Meet();
    gpu.transport().Recv(std::move(message), outcome.Handler());
  }
  CHECK_EQ(outcome.Await().text, "");
  CHECK(GpuRank::Eventually([&] { return !memory.IsKept(); }));
  CHECK(!gpu.transport().Holds(id));
  self.Meet();
}

void ReservedPlaces(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const std::vector<size_t> sizes = {300000, 1000, 0, 2000, 5};
  std::vector<Outcome> outcomes;
  if (self.rank == 0) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      outcomes.push_back(gpu.Send(1, Memory(sizes[i], 10 + i).Give(), i == 1));
    }
    self.Meet();
  } else {
    std::vector<Memory> memory;
    for (const size_t bytes : sizes) memory.emplace_back(bytes, 0);
    std::vector<uint64_t> ids(sizes.size());
    for (const size_t i : {0u, 1u, 2u, 3u, 4u}) {
      outcomes.push_back(i % 3 == 0 ? gpu.Reserve(0, &ids[i])
                                    : gpu.Recv(0, memory[i].buffer(), i == 1));
    }
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    for (const Outcome& outcome : outcomes) CHECK(!outcome.IsOver());
    // In any order: the second one waits for the first.
    gpu.transport().Fill(ids[3], memory[3].buffer());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    for (const Outcome& outcome : outcomes) CHECK(!outcome.IsOver());
    gpu.transport().Fill(ids[0], memory[0].buffer());
    for (size_t i = 0; i < sizes.size(); ++i) {
      CHECK_EQ(outcomes[i].Await().text, "");
      CHECK(memory[i].Text() == Memory::Pattern(sizes[i], 10 + static_cast<int>(i)));
    }
    gpu.transport().Fill(ids[0], memory[0].buffer());  // over: nothing happens
  }
  for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
  self.Meet();
}

// Nothing of what is held back is on the device before somebody waits for it, as the
// device would not be idle.
void HeldReceivesBeginWhenJoined(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  constexpr int kCount = 4;
  if (self.rank == 0) {
    for (int i = 0; i < kCount; ++i) gpu.Send(1, Memory(1000, i).Give());
    self.Meet();
  } else {
    std::vector<Memory> memory;
    std::vector<Outcome> outcomes(kCount);
    uint64_t ids[kCount];
    const int before = Fakes().NcclCounts().operations;
    for (int i = 0; i < kCount; ++i) {
      memory.emplace_back(1000, 9);
      Message message = gpu.To(0, memory.back().buffer(), /*more=*/i == 0);
      message.hold = i < 3;
      ids[i] = message.id;
      gpu.transport().Recv(std::move(message), outcomes[i].Handler());
    }
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK_EQ(Fakes().NcclCounts().operations, before);
    const auto join = [&](uint64_t id) {
      Outcome told;
      gpu.transport().Join(id, gpu.compute(), told.Handler());
      CHECK_EQ(told.Await().text, "");
    };
    join(ids[1]);
    CHECK_EQ(Fakes().NcclCounts().operations, before + 2);
    // The last one is not held, and yet behind one that is.
    join(ids[3]);
    CHECK_EQ(Fakes().NcclCounts().operations, before + kCount);
    for (int i = 0; i < kCount; ++i) {
      CHECK_EQ(outcomes[i].Await().text, "");
      CHECK(memory[i].Text() == Memory::Pattern(1000, i));
    }
  }
  self.Meet();
}

// Rank 0 sends the second message when it has the answer to the first one. That one
// gets its memory when the second has its own already, and must not wait for it.
void OnlyWhatBelongsTogetherIsOne(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  Memory first(1000, 1), answer(1000, 2), second(1000, 3);
  Outcome last;
  if (self.rank == 0) {
    gpu.Send(1, first.Give());
    CHECK_EQ(gpu.Recv(1, answer.buffer()).Await().text, "");
    last = gpu.Send(1, second.buffer());
  } else {
    uint64_t id = 0;
    const Outcome received = gpu.Reserve(0, &id);
    last = gpu.Recv(0, second.buffer());
    gpu.transport().Fill(id, first.buffer());
    CHECK_EQ(received.Await().text, "");
    gpu.Send(0, answer.Give());
  }
  CHECK_EQ(last.Await().text, "");
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunProcesses("GPU: sends wait for their stream", 2, SendsWaitForTheirStream);
  RunProcesses("GPU: receives wait for their stream", 2, ReceivesWaitForTheirStream);
  RunProcesses("GPU: a joined stream waits", 2, AJoinedStreamWaits);
  RunProcesses("GPU: owners are released", 2, OwnersAreReleased);
  RunProcesses("GPU: reserved places", 2, ReservedPlaces);
  RunProcesses("GPU: held receives begin when joined", 2, HeldReceivesBeginWhenJoined);
  RunProcesses("GPU: only what belongs together is one", 2,
               OnlyWhatBelongsTogetherIsOne);
}
