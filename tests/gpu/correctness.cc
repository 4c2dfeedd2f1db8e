// Messages between two ranks on the GPU, or GPUs, of this machine; see run.sh.
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <thread>

#include "machine.h"

namespace smp::testing {
namespace {

Machine machine;

// Elements of all sizes that TensorFlow's types have, and numbers of them up to 64 MiB.
void AllSizesAndTypes(Process& self) {
  GpuSide gpu(self, machine);
  const size_t largest = size_t{64} << 20;
  for (const size_t element : {1, 2, 4, 8, 16}) {
    for (const size_t count :
         {size_t{0}, size_t{1}, size_t{7}, size_t{1000}, size_t{4096},
          (1 << 20) / element + 3, largest / element}) {
      const size_t bytes = element * count;
      if (bytes == largest && element != 4 && machine.small) continue;
      const Buffer out = gpu.Allocate(bytes), in = gpu.Allocate(bytes);
      gpu.Write(out, Pattern(bytes, self.rank + 1));
      const Ending sent = gpu.Send(out), received = gpu.Recv(in);
      CHECK_EQ(received.Await().text, "");
      CHECK_EQ(sent.Await().text, "");
      CHECK(gpu.Read(in) == Pattern(bytes, gpu.peer() + 1));
    }
  }
  self.Meet();
}

// Both send all they have first; the two ends have other groups.
void OrderAndGroups(Process& self) {
  constexpr int kCount = 60;
  GpuSide gpu(self, machine);
  const auto bytes = [](int i) { return static_cast<size_t>(i % 9) * i * 997; };
  std::vector<Ending> endings;
  std::vector<Buffer> out, in;
  // All of them before the first send, which Write would wait for.
  for (int i = 0; i < kCount; ++i) {
    out.push_back(gpu.Allocate(bytes(i)));
    gpu.Write(out[i], Pattern(bytes(i), i + self.rank));
    in.push_back(gpu.Allocate(bytes(i)));
  }
  for (int i = 0; i < kCount; ++i) {
    endings.push_back(gpu.Send(out[i], (i + 1) % 4 != 0));
  }
  for (int i = 0; i < kCount; ++i) {
    endings.push_back(gpu.Recv(in[i], (i + 1) % (self.rank == 0 ? 3 : 5) != 0));
  }
  for (const Ending& ending : endings) CHECK_EQ(ending.Await().text, "");
  for (int i = 0; i < kCount; ++i) {
    CHECK(gpu.Read(in[i]) == Pattern(bytes(i), i + gpu.peer()));
  }
  self.Meet();
}

// A send waits for the computation of its data, a computation for what it has joined,
// and nothing waits for a computation that was given later.
void OverlapsWithComputation(Process& self) {
  constexpr size_t kBytes = 1 << 20;
  GpuSide gpu(self, machine);
  gpu.Compute(0.01);  // measures how fast it is
  gpu.Synchronize();
  const Buffer data = gpu.Allocate(kBytes), copy = gpu.Allocate(kBytes);
  const auto address = [](const Buffer& buffer) {
    return reinterpret_cast<CudaAddress>(buffer.data);
  };
  self.Meet();
  for (int round = 0; round < 3; ++round) {
    gpu.Write(data, std::string(kBytes, 'o'));
    const std::string expected(kBytes, static_cast<char>('a' + round));
    uint64_t id = 0;
    Ending ending;
    if (self.rank == 0) {
      gpu.Compute(0.1);
      {
        const GpuDevice::Current current(*gpu.device());
        gpu.Check(gpu.more().MemsetD8Async(address(data),
                                           static_cast<unsigned char>('a' + round),
                                           kBytes, gpu.stream()),
                  "cuMemsetD8Async");
      }
      const double start = Now();
      ending = gpu.Send(data, false, &id);
      CHECK(Now() - start < 0.05);  // not kept until the data is there
    } else {
      ending = gpu.Recv(data, false, &id);
      gpu.Join(id);
      const GpuDevice::Current current(*gpu.device());
      gpu.Check(gpu.more().MemcpyDtoDAsync(address(copy), address(data), kBytes,
                                           gpu.stream()),
                "cuMemcpyDtoDAsync");
    }
    gpu.Compute(0.2);
    GpuEvent after;
    CHECK_EQ(gpu.device()->Record(gpu.stream(), &after).text, "");
    CHECK_EQ(ending.Await().text, "");
    Status status;
    CHECK(!gpu.device()->IsOver(after, &status));
    gpu.Synchronize();
    if (self.rank == 1) CHECK(gpu.Read(copy) == expected);
    self.Meet();
  }
}

void Sums(Process& self) {
  GpuSide gpu(self, machine);
  std::string id;
  if (self.rank == 0) CHECK_EQ(NcclTransport::MakeId(gpu.nccl(), &id).text, "");
  const auto ids = self.Exchange(id);
  int group = -1;
  CHECK_EQ(
      gpu.transport()
          .ConnectGroup({0, 1}, self.rank, self.rank == 0 ? id : ids[0], 50, &group)
          .text,
      "");
  std::vector<float> values(100003);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(i + self.rank);
  Message message;
  message.id = NextId();
  message.peer = group;
  message.buffer = gpu.Allocate(values.size() * sizeof(float));
  message.stream = gpu.stream();
  message.sum = {message.buffer.data, kNcclFloat32};
  const Buffer buffer = message.buffer;
  gpu.Write(buffer,
            std::string(reinterpret_cast<const char*>(values.data()), buffer.bytes));
  Ending ending;
  gpu.transport().AllReduce(std::move(message), ending.Handler());
  CHECK_EQ(ending.Await().text, "");
  const std::string sums = gpu.Read(buffer);
  for (size_t i = 0; i < values.size(); ++i) {
    float sum = 0;
    std::memcpy(&sum, sums.data() + i * sizeof sum, sizeof sum);
    CHECK_EQ(sum, static_cast<float>(2 * i + 1));
  }
  self.Meet();
}

// Rank 0 is told of it as a job tells it; waits, memory and the GPU must be free again.
void AKilledPeer(Process& self) {
  GpuSide gpu(self, machine);
  if (self.rank == 1) {
    self.Meet();
    usleep(200000);
    raise(SIGKILL);
  }
  Buffer in = gpu.Allocate(1 << 20), out = gpu.Allocate(64 << 20);
  const std::vector<std::weak_ptr<void>> kept = {in.owner, out.owner};
  uint64_t id = 0;
  const std::vector<Ending> endings = {gpu.Recv(in, false, &id), gpu.Send(out)};
  gpu.Join(id);
  in = out = {};
  self.Meet();
  usleep(700000);
  for (const Ending& ending : endings) CHECK(!ending.IsOver());
  const double start = Now();
  gpu.transport().Break(1, {Code::kUnavailable, "rank 1 died (test)"}, false);
  for (const Ending& ending : endings) {
    CHECK_EQ(ending.Await().text, "rank 1 died (test)");
  }
  CHECK(Now() - start < 1);
  gpu.Synchronize();  // the stream that has joined the receive goes on
  for (const auto& each : kept) {
    while (!each.expired() && Now() - start < 20) usleep(1000);
    CHECK(each.expired());
  }
  std::printf("     a waiting rank was free %.2f s after it was told\n", Now() - start);
}

}  // namespace
}  // namespace smp::testing

int main(int count, char** arguments) {
  using namespace smp::testing;
  machine = Machine::FromArguments(count, arguments);
  RunProcesses("all sizes and types", 2, AllSizesAndTypes);
  RunProcesses("order and groups", 2, OrderAndGroups);
  RunProcesses("overlap with computation", 2, OverlapsWithComputation);
  RunProcesses("sums", 2, Sums);
  RunProcesses("kill -9 of a peer", 2, AKilledPeer, {0, SIGKILL});
}
