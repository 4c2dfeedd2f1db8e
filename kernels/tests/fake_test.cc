// The fakes of CUDA and NCCL themselves: what the tests of the transport rely on.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "gpu_rank.h"

namespace smp::testing {
namespace {

struct Communicator {
  Communicator(Process& self, const Cuda& cuda) {
    const Nccl& nccl = Fakes().nccl;
    NcclId id = {};
    if (self.rank == 0) CHECK_EQ(nccl.GetUniqueId(&id), kNcclSuccess);
    const auto ids = self.Exchange(std::string(id.bytes, sizeof id.bytes));
    if (self.rank > 0) std::memcpy(id.bytes, ids[0].data(), sizeof id.bytes);
    CHECK_EQ(cuda.DevicePrimaryCtxRetain(&context, 0), kCudaSuccess);
    CHECK_EQ(cuda.CtxPushCurrent(context), kCudaSuccess);
    CHECK_EQ(nccl.CommInitRank(&comm, self.size, id, self.rank), kNcclSuccess);
    CHECK_EQ(cuda.StreamCreate(&stream, kCudaStreamNonBlocking), kCudaSuccess);
  }

  CudaContext context = nullptr;
  NcclComm comm = nullptr;
  CudaStream stream = nullptr;
};

void EventsAndStreams(Process&) {
  const Cuda& cuda = Fakes().cuda;
  CudaEvent event = nullptr;
  CudaStream one = nullptr, other = nullptr;
  // Without a context there is nothing to make.
  CHECK(cuda.EventCreate(&event, 0) != kCudaSuccess);
  CHECK(cuda.StreamCreate(&one, 0) != kCudaSuccess);
  CHECK_EQ(Fakes().CudaCounts().mistakes, 2);
  CudaContext context = nullptr;
  CHECK_EQ(cuda.DevicePrimaryCtxRetain(&context, 0), kCudaSuccess);
  CHECK_EQ(cuda.CtxPushCurrent(context), kCudaSuccess);
  CHECK_EQ(cuda.EventCreate(&event, kCudaEventDisableTiming), kCudaSuccess);
  CHECK_EQ(cuda.StreamCreate(&one, kCudaStreamNonBlocking), kCudaSuccess);
  CHECK_EQ(cuda.StreamCreate(&other, kCudaStreamNonBlocking), kCudaSuccess);
  // Never recorded: over, and nothing to wait for.
  CHECK_EQ(cuda.EventQuery(event), kCudaSuccess);
  CHECK_EQ(cuda.StreamWaitEvent(other, event, 0), kCudaSuccess);
  Synchronize(other);
  // Who waits, waits for the record before; the question is about the latest.
  Gate first(one);
  CHECK_EQ(cuda.EventRecord(event, one), kCudaSuccess);
  CHECK_EQ(cuda.StreamWaitEvent(other, event, 0), kCudaSuccess);
  std::atomic<bool> passed{false};
  PutOnStream(other, [&] { passed = true; });
  Gate second(one);
  CHECK_EQ(cuda.EventRecord(event, one), kCudaSuccess);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!passed);
  first.Open();
  Synchronize(other);
  CHECK(passed);
  CHECK_EQ(cuda.EventQuery(event), kCudaNotReady);
  // Streams and events go at once; what is on the streams is still done.
  std::atomic<bool> done{false};
  PutOnStream(one, [&] { done = true; });
  CHECK_EQ(cuda.StreamDestroy(one), kCudaSuccess);
  CHECK_EQ(cuda.EventDestroy(event), kCudaSuccess);
  CHECK(!done);
  second.Open();
  CHECK(GpuRank::Eventually([&] { return done.load(); }));
  CHECK_EQ(cuda.StreamDestroy(other), kCudaSuccess);
  CHECK_EQ(cuda.CtxPopCurrent(nullptr), kCudaSuccess);
  const FakeCudaCounts counts = Fakes().CudaCounts();
  CHECK_EQ(counts.streams + counts.events + counts.contexts_pushed, 0);
  CHECK_EQ(counts.mistakes, 2);
  CHECK(cuda.EventQuery(event) != kCudaSuccess);
  CHECK_EQ(Fakes().CudaCounts().mistakes, 3);
}

// Each sends much more than fits on the way, before it receives.
void GroupsMakeProgressSideBySide(Process& self) {
  const Nccl& nccl = Fakes().nccl;
  const Communicator own(self, Fakes().cuda);
  const int peer = 1 - self.rank;
  const size_t bytes = 4 << 20;
  Memory out(bytes, self.rank), in(bytes, 9), small(10, 9);
  CHECK_EQ(nccl.GroupStart(), kNcclSuccess);
  CHECK_EQ(nccl.Send(out.buffer().data, bytes, kNcclInt8, peer, own.comm, own.stream),
           kNcclSuccess);
  CHECK_EQ(nccl.Send(out.buffer().data, 10, kNcclInt8, peer, own.comm, own.stream),
           kNcclSuccess);
  CHECK_EQ(nccl.Recv(in.buffer().data, bytes, kNcclInt8, peer, own.comm, own.stream),
           kNcclSuccess);
  CHECK_EQ(nccl.Recv(small.buffer().data, 10, kNcclInt8, peer, own.comm, own.stream),
           kNcclSuccess);
  CHECK_EQ(Fakes().NcclCounts().launches, 0);
  CHECK_EQ(nccl.GroupEnd(), kNcclSuccess);
  Synchronize(own.stream);
  CHECK_EQ(Fakes().NcclCounts().launches, 1);
  CHECK_EQ(Fakes().NcclCounts().operations, 4);
  CHECK(in.Text() == Memory::Pattern(bytes, peer));
  CHECK(small.Text() == Memory::Pattern(10, peer));
  CHECK_EQ(nccl.CommDestroy(own.comm), kNcclSuccess);
  self.Meet();
}

void AFirstMessageKeepsItsCaller(Process& self) {
  const Nccl& nccl = Fakes().nccl;
  const Communicator own(self, Fakes().cuda);
  int value = self.rank;
  if (self.rank == 0) {
    std::atomic<bool> returned{false};
    std::thread sender([&] {
      CHECK_EQ(nccl.Send(&value, 1, kNcclInt32, 1, own.comm, own.stream), kNcclSuccess);
      returned = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(!returned);
    self.Meet();
    sender.join();
    Synchronize(own.stream);  // an abort would lose it as well
    // Not so the next one, which is received by nobody: its function ends by the abort.
    Memory large(4 << 20, 0);
    CHECK_EQ(
        nccl.Send(large.buffer().data, 4 << 20, kNcclInt8, 1, own.comm, own.stream),
        kNcclSuccess);
    CHECK_EQ(nccl.CommAbort(own.comm), kNcclSuccess);
    Synchronize(own.stream);
  } else {
    self.Meet();
    CHECK_EQ(nccl.Recv(&value, 1, kNcclInt32, 0, own.comm, own.stream), kNcclSuccess);
    Synchronize(own.stream);
    CHECK_EQ(value, 0);
    CHECK_EQ(nccl.CommAbort(own.comm), kNcclSuccess);
  }
  CHECK_EQ(Fakes().NcclCounts().mistakes, 0);
  self.Meet();
}

void MistakesAreSeen(Process& self) {
  const Nccl& nccl = Fakes().nccl;
  const Communicator own(self, Fakes().cuda);
  const int peer = 1 - self.rank;
  Memory memory(100, 1);
  void* const data = memory.buffer().data;
  if (self.rank == 0) {
    for (const size_t bytes : {8, 100, 5}) {
      CHECK_EQ(nccl.Send(data, bytes, kNcclInt8, peer, own.comm, own.stream),
               kNcclSuccess);
    }
  } else {
    for (const size_t bytes : {100, 8, 5}) {
      CHECK_EQ(nccl.Recv(data, bytes, kNcclInt8, peer, own.comm, own.stream),
               kNcclSuccess);
    }
  }
  Synchronize(own.stream);
  CHECK_EQ(Fakes().NcclCounts().mismatches, self.rank == 0 ? 0 : 2);
  CHECK(nccl.Send(data, 1, kNcclInt8, 2, own.comm, own.stream) != kNcclSuccess);
  CHECK(nccl.GroupEnd() != kNcclSuccess);
  CHECK_EQ(Fakes().NcclCounts().mistakes, 2);
  self.Meet();
  // With work that still waits.
  Gate gate(own.stream);
  if (self.rank == 0) {
    CHECK_EQ(nccl.Send(data, 1, kNcclInt8, peer, own.comm, own.stream), kNcclSuccess);
    std::thread opener([&] {
      CHECK(GpuRank::Eventually([] { return Fakes().NcclCounts().mistakes == 3; }));
      gate.Open();
    });
    nccl.CommDestroy(own.comm);  // waits for it
    opener.join();
  } else {
    gate.Open();
    nccl.CommAbort(own.comm);
    CHECK(nccl.Recv(data, 1, kNcclInt8, peer, own.comm, own.stream) != kNcclSuccess);
    CHECK_EQ(Fakes().NcclCounts().mistakes, 3);
  }
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  setenv("FAKE_GPU_QUIET", "1", 1);
  RunProcesses("fake: events and streams", 1, EventsAndStreams);
  RunProcesses("fake: groups make progress side by side", 2,
               GroupsMakeProgressSideBySide);
  RunProcesses("fake: a first message keeps its caller", 2,
               AFirstMessageKeepsItsCaller);
  RunProcesses("fake: mistakes are seen", 2, MistakesAreSeen);
}
