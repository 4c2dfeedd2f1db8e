// Messages and sums between GPUs, when nothing goes wrong: NcclTransport over fakes of
// CUDA and NCCL, between real processes.
#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "gpu_rank.h"

namespace smp::testing {
namespace {

constexpr size_t kLarge = 64 << 20;

void MessagesOfAllSizes(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  const std::vector<size_t> sizes = {0, 1, 7, 4096, (1 << 20) + 3, kLarge};
  for (const size_t bytes : sizes) {
    Memory out(bytes, 10 + self.rank), in(bytes, 0);
    const Outcome sent = gpu.Send(peer, out.buffer());
    const Outcome received = gpu.Recv(peer, in.buffer());
    CHECK_EQ(received.Await().text, "");
    CHECK_EQ(sent.Await().text, "");
    CHECK(in.Text() == Memory::Pattern(bytes, 10 + peer));
  }
  self.Meet();
}

// Both ranks send all they have before they receive anything.
void ManyMessagesBothWays(Process& self) {
  constexpr int kCount = 300;
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  std::mt19937 random(7);
  std::vector<size_t> sizes(kCount);
  for (size_t& each : sizes) each = random() % 4 ? random() % 5000 : random() % 300000;
  std::vector<Outcome> outcomes;
  for (int i = 0; i < kCount; ++i) {
    outcomes.push_back(gpu.Send(peer, Memory(sizes[i], i + self.rank).Give()));
  }
  self.Meet();
  std::vector<Memory> in;
  for (int i = 0; i < kCount; ++i) {
    in.emplace_back(sizes[i], 0);
    outcomes.push_back(gpu.Recv(peer, in.back().buffer()));
  }
  for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
  for (int i = 0; i < kCount; ++i) {
    CHECK(in[i].Text() == Memory::Pattern(sizes[i], i + peer));
  }
  self.Meet();
}

// The two ends need not have the same groups.
void GroupsOfMessages(Process& self) {
  constexpr int kCount = 24;
  GpuRank gpu(self);
  gpu.Connect();
  const std::vector<std::pair<int, int>> sent_received = {{1, 1}, {4, 4}, {6, 1},
                                                          {1, 6}, {4, 3}, {24, 2}};
  for (const auto& [out, in] : sent_received) {
    const int length = self.rank == 0 ? out : in;
    const int launches = Fakes().NcclCounts().launches;
    const auto bytes = [](int i) { return static_cast<size_t>(i) * i * 2000; };
    std::vector<Memory> memory;
    std::vector<Outcome> outcomes;
    for (int i = 0; i < kCount; ++i) {
      const bool more = (i + 1) % length != 0;
      memory.emplace_back(bytes(i), self.rank == 0 ? i : -1);
      outcomes.push_back(self.rank == 0 ? gpu.Send(1, memory.back().buffer(), more)
                                        : gpu.Recv(0, memory.back().buffer(), more));
    }
    for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
    for (int i = 0; i < kCount; ++i) {
      CHECK(memory[i].Text() == Memory::Pattern(bytes(i), i));
    }
    // The first one is empty: there is nothing to launch.
    CHECK_EQ(Fakes().NcclCounts().launches - launches,
             kCount / length - (length == 1 ? 1 : 0));
  }
  self.Meet();
}

void WaitsForSends(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  CHECK(gpu.transport().WaitForSends(10));
  if (self.rank == 0) {
    self.Meet();
    const Outcome received = gpu.Send(1, Memory(1 << 20, 1).Give());
    self.Meet();
    const Outcome sent = gpu.Send(1, Memory(2 << 20, 1).Give());
    CHECK(!gpu.transport().WaitForSends(0.05));
    self.Meet();
    CHECK(gpu.transport().WaitForSends(30));
    CHECK_EQ(sent.Await().text, "");
  } else {
    const Outcome received = gpu.Recv(0, Memory(1 << 20, 0).Give());
    CHECK(gpu.transport().WaitForSends(10));  // receives do not count
    self.Meet();
    CHECK_EQ(received.Await().text, "");
    self.Meet();
    self.Meet();
    CHECK_EQ(gpu.Recv(0, Memory(2 << 20, 0).Give()).Await().text, "");
  }
  self.Meet();
}

// A callback may post the next message.
void PingPong(Process& self) {
  constexpr int kRounds = 200;
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  Memory memory(64, 0);
  int* const number = static_cast<int*>(memory.buffer().data);
  *number = 0;
  Outcome end;
  std::function<void()> receive = [&] {
    gpu.transport().Recv(gpu.To(peer, memory.buffer()), [&](const Status& status) {
      CHECK_EQ(status.text, "");
      ++*number;
      const bool last = *number >= kRounds;
      gpu.transport().Send(gpu.To(peer, memory.buffer()),
                           [&, last](const Status& sent) {
                             if (last) {
                               end.Handler()(sent);
                             } else {
                               receive();
                             }
                           });
    });
  };
  if (self.rank == 0) {
    gpu.transport().Send(gpu.To(peer, memory.buffer()),
                         [&](const Status&) { receive(); });
  } else {
    receive();
  }
  CHECK_EQ(end.Await().text, "");
  // The one of the two that has counted last has sent once more.
  if (self.rank == kRounds % 2) {
    CHECK_EQ(gpu.Recv(peer, memory.buffer()).Await().text, "");
  }
  self.Meet();
}

// Each thread's messages are any of the other rank's, as all have the same size.
void ManyThreads(Process& self) {
  constexpr int kThreads = 4, kEach = 100;
  constexpr size_t kBytes = 3000;
  GpuRank gpu(self);
  gpu.Connect();
  const int peer = 1 - self.rank;
  // A stream of its own for those who read: were it the one that the sends wait for,
  // each rank's sends could wait for the other one's.
  CudaStream readers = nullptr;
  CHECK_EQ(gpu.device()->MakeStream(&readers).text, "");
  std::vector<std::atomic<int>> seen(kThreads * kEach);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      std::vector<Memory> in;
      std::vector<Outcome> outcomes;
      for (int i = 0; i < kEach; ++i) {
        Memory out(kBytes, self.rank);
        const int number = thread * kEach + i;
        std::memcpy(out.buffer().data, &number, sizeof number);
        outcomes.push_back(gpu.Send(peer, out.Give(), i % 3 == 0));
        in.emplace_back(kBytes, 0);
        Message message = gpu.To(peer, in.back().buffer());
        const uint64_t id = message.id;
        Outcome received, told;
        gpu.transport().Recv(std::move(message), received.Handler());
        gpu.transport().Join(id, readers, told.Handler());
        gpu.transport().Holds(id);
        outcomes.push_back(received);
        outcomes.push_back(told);
      }
      // The last one says that nothing follows.
      outcomes.push_back(gpu.Send(peer, Memory(0, 0).Give()));
      for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
      for (const Memory& memory : in) {
        int number = -1;
        std::memcpy(&number, memory.buffer().data, sizeof number);
        CHECK(number >= 0 && number < kThreads * kEach);
        ++seen[number];
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& count : seen) CHECK_EQ(count.load(), 1);
  gpu.device()->FreeStream(readers);
  self.Meet();
}

template <typename Type>
Outcome Sum(GpuRank& gpu, int group, int type, const Memory& from, const Memory& to,
            bool more) {
  Message message = gpu.To(group, from.buffer(), more);
  message.sum = {to.buffer().data, type};
  Outcome outcome;
  gpu.transport().AllReduce(std::move(message), outcome.Handler());
  return outcome;
}

template <typename Type>
void CheckSum(const Memory& memory, Type expected) {
  const auto* const values = static_cast<const Type*>(memory.buffer().data);
  for (size_t i = 0; i < memory.buffer().bytes / sizeof(Type); ++i) {
    CHECK_EQ(values[i], static_cast<Type>(expected + static_cast<Type>(3 * i)));
  }
}

template <typename Type>
void Fill(const Memory& memory, int rank) {
  auto* const values = static_cast<Type*>(memory.buffer().data);
  for (size_t i = 0; i < memory.buffer().bytes / sizeof(Type); ++i) {
    values[i] = static_cast<Type>(static_cast<Type>(i) + static_cast<Type>(rank));
  }
}

void Sums(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  int all = -1, none = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1, 2}, &all).text, "");
  CHECK(gpu.transport()
            .ConnectGroup({(self.rank + 1) % 3}, self.rank, "", 1, &none)
            .code == Code::kInvalid);
  constexpr size_t kBytes = 400000;
  Memory floats(kBytes, 0), doubles(kBytes, 0), ints(kBytes, 0), longs(8, 0);
  Memory float_sums(kBytes, 0), double_sums(kBytes, 0);
  Fill<float>(floats, self.rank);
  Fill<double>(doubles, self.rank);
  Fill<int32_t>(ints, self.rank);
  Fill<int64_t>(longs, self.rank);
  std::vector<Outcome> outcomes;
  Memory message(50000, 5 + self.rank), arrived(50000, 0);
  outcomes.push_back(gpu.Send((self.rank + 1) % 3, message.buffer()));
  outcomes.push_back(Sum<float>(gpu, all, kNcclFloat32, floats, float_sums, true));
  outcomes.push_back(Sum<double>(gpu, all, kNcclFloat64, doubles, double_sums, true));
  outcomes.push_back(Sum<int32_t>(gpu, all, kNcclInt32, ints, ints, false));
  outcomes.push_back(Sum<int64_t>(gpu, all, kNcclInt64, longs, longs, false));
  outcomes.push_back(gpu.Recv((self.rank + 2) % 3, arrived.buffer()));
  for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
  CheckSum<float>(float_sums, 3);
  CheckSum<double>(double_sums, 3);
  CheckSum<int32_t>(ints, 3);
  CheckSum<int64_t>(longs, 3);
  CHECK(arrived.Text() == Memory::Pattern(50000, 5 + (self.rank + 2) % 3));
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunProcesses("GPU: messages of all sizes", 2, MessagesOfAllSizes);
  RunProcesses("GPU: many messages both ways", 2, ManyMessagesBothWays);
  RunProcesses("GPU: groups of messages", 2, GroupsOfMessages);
  RunProcesses("GPU: waits for sends", 2, WaitsForSends);
  RunProcesses("GPU: ping-pong of callbacks", 2, PingPong);
  RunProcesses("GPU: many threads", 2, ManyThreads);
  RunProcesses("GPU: sums", 3, Sums);
}
