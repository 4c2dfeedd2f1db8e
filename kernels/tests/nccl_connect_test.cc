// How connections between GPUs are made, or not: NcclTransport over fakes of CUDA and
// NCCL, between real processes.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "gpu_rank.h"

namespace smp::testing {
namespace {

const Status kDied = {Code::kUnavailable, "rank 1 died (test)"};

// A rank may connect while a receive of another lane waits on the device for one that
// comes only when it is connected.
void ConnectsWhileAReceiveWaits(Process& self) {
  GpuRank gpu(self);
  gpu.Connect();
  Outcome waiting;
  if (self.rank == 0) waiting = gpu.Recv(1, Memory(1000, 0).Give());
  int group = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1}, &group).text, "");
  self.Meet();
  if (self.rank == 1) waiting = gpu.Send(0, Memory(1000, 1).Give());
  CHECK_EQ(waiting.Await().text, "");
  self.Meet();
}

void AMissingPeerIsNamed(Process& self) {
  GpuRank gpu(self);
  CHECK_EQ(gpu.Send(1 - self.rank, Memory(4, 0).Give()).Await().text,
           "there is no connection by NCCL for messages to rank " +
               std::to_string(1 - self.rank));
  std::string id;
  if (self.rank == 0) CHECK_EQ(NcclTransport::MakeId(Fakes().nccl, &id).text, "");
  const auto ids = self.Exchange(id);
  if (self.rank == 0) {
    const Status status = gpu.transport().Connect(1, Way::kSend, id, 0.2);
    CHECK(status.code == Code::kDeadline);
    CHECK_EQ(status.text,
             "no connection by NCCL for messages to rank 1 within timeout_s=0.2");
    CHECK(!gpu.transport().IsConnected(1, Way::kSend));
  }
  self.Meet();
  // It comes after all, and meets one that has given up.
  if (self.rank == 1) gpu.transport().Connect(0, Way::kRecv, ids[0], 20);
  CHECK_EQ(gpu.transport().Connect(1 - self.rank, Way::kRecv, "short", 1).text,
           "an id of NCCL has 128 bytes; bytes=5");
  self.Meet();
}

// With NCCL_COMM_BLOCKING=0 every call of NCCL returns early.
void CallsThatReturnEarly(Process& self) {
  setenv("NCCL_COMM_BLOCKING", "0", 1);
  GpuRank gpu(self);
  gpu.Connect();
  int group = -1;
  CHECK_EQ(gpu.ConnectGroup({0, 1}, &group).text, "");
  const int peer = 1 - self.rank;
  std::vector<Outcome> outcomes;
  std::vector<Memory> memory;
  for (int i = 0; i < 5; ++i) {
    outcomes.push_back(gpu.Send(peer, Memory(1000, i).Give()));
    memory.emplace_back(1000, 9);
    outcomes.push_back(gpu.Recv(peer, memory.back().buffer()));
  }
  for (const Outcome& outcome : outcomes) CHECK_EQ(outcome.Await().text, "");
  for (int i = 0; i < 5; ++i) CHECK(memory[i].Text() == Memory::Pattern(1000, i));
  CHECK_EQ(Fakes().NcclCounts().mistakes, 0);
  self.Meet();
}

// It dies when the communicator is there, and its first message is not.
void DeathWhileConnecting(Process& self) {
  GpuRank gpu(self);
  std::string id;
  if (self.rank == 0) CHECK_EQ(NcclTransport::MakeId(Fakes().nccl, &id).text, "");
  const auto ids = self.Exchange(id);
  if (self.rank == 1) {
    NcclId nccl_id;
    ids[0].copy(nccl_id.bytes, sizeof nccl_id.bytes);
    NcclComm comm = nullptr;
    const GpuDevice::Current current(*gpu.device());
    CHECK_EQ(Fakes().nccl.CommInitRank(&comm, 2, nccl_id, 1), kNcclSuccess);
    self.Meet();
    raise(SIGKILL);
  }
  std::thread teller([&] {
    self.Meet();
    usleep(100000);
    gpu.transport().Break(1, kDied, /*drain=*/false);
  });
  CHECK_EQ(gpu.transport().Connect(1, Way::kSend, id, 30).text, kDied.text);
  teller.join();
  CHECK_EQ(gpu.transport().Connect(1, Way::kSend, id, 30).text, kDied.text);
  std::exit(0);  // a thread waits inside of NCCL for ever, and keeps the device
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunProcesses("GPU: calls that return early", 2, CallsThatReturnEarly);
  RunProcesses("GPU: connects while a receive waits", 2, ConnectsWhileAReceiveWaits);
  RunProcesses("GPU: a missing peer is named", 2, AMissingPeerIsNamed);
  RunProcesses("GPU: death while connecting", 2, DeathWhileConnecting, {0, SIGKILL});
}
