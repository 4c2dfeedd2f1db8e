// Jobs whose ranks have a GPU: NcclTransport under a Job, over fakes of CUDA and NCCL,
// and next to UCX, whose monitor knows of deaths.
#include <chrono>
#include <csignal>
#include <thread>

#include "gpu_rank.h"
#include "testing.h"

namespace smp::testing {
namespace {

constexpr size_t kBytes = 2 << 20;  // more than a connection of the fake holds

// A rank of a job with a GPU, and a stream of computations on it.
class GpuJob {
 public:
  explicit GpuJob(Rank& self) : self_(self) {
    CHECK_EQ(self.Join(&job_).text, "");
    // After UCX, which would take the fake for CUDA and miss most of it; before the job
    // looks for libraries of these names, which then are there.
    device_ = std::make_shared<GpuDevice>(&Fakes().cuda);
    CHECK_EQ(device_->Open(0).text, "");
    CHECK_EQ(device_->MakeStream(&stream_).text, "");
    CHECK_EQ(job_->ConnectGpu(0, Way::kSend, "").text,
             "the GPU of this rank is not open");
    CHECK_EQ(job_->OpenGpu(0).text, "");
    for (int source = 0; source < self.size; ++source) {
      for (int target = 0; target < self.size; ++target) {
        if (source != target) Connect(source, target);
      }
    }
    std::vector<int> all;
    for (int rank = 0; rank < self.size; ++rank) all.push_back(rank);
    CHECK_EQ(job_->ConnectGroup(all, ShareId(0), &group_).text, "");
  }

  ~GpuJob() {
    job_.reset();
    device_->FreeStream(stream_);
    CHECK_EQ(Fakes().NcclCounts().communicators, 0);
    CHECK_EQ(Fakes().NcclCounts().mistakes, 0);
    CHECK_EQ(Fakes().CudaCounts().mistakes, 0);
  }

  TicketPtr Recv(int peer, uint32_t channel, Buffer buffer) {
    const RoutePtr route = To(peer, channel);
    const Status status = mailbox().PostRecv(route, Part::kPayload, std::move(buffer),
                                             /*run=*/1, {stream_});
    CHECK_EQ(status.text, "");
    return mailbox().Take(route).ticket;
  }

  Status Send(int peer, uint32_t channel, Buffer buffer) {
    return mailbox().PostSend(To(peer, channel), nullptr, std::move(buffer), nullptr,
                              {stream_});
  }

  TicketPtr Sum(Buffer buffer) {
    const smp::Sum sum = {buffer.data, kNcclFloat32};
    return mailbox().TakeSum(mailbox().PostSum(group_, "a sum of ranks 0, 1, 2",
                                               std::move(buffer), sum, stream_));
  }

  Status Flush() {
    const TicketPtr flush = mailbox().Flush();
    mailbox().Wait(flush, [](const Status&) {});
    CHECK(flush->WaitFor(kTestSeconds));
    return flush->status();
  }

  Job& job() { return *job_; }
  Mailbox& mailbox() { return job_->gpu()->mailbox; }
  CudaStream stream() const { return stream_; }

 private:
  static RoutePtr To(int peer, uint32_t channel) {
    return std::make_shared<Route>(Route{peer, channel, "h"});
  }

  std::string ShareId(int maker) {
    std::string id;
    if (self_.rank == maker) {
      CHECK_EQ(NcclTransport::MakeId(Fakes().nccl, &id).text, "");
    }
    const auto ids = self_.Exchange(id);
    return self_.rank == maker ? id : ids[maker];
  }

  void Connect(int source, int target) {
    const std::string id = ShareId(source);
    if (self_.rank == source) {
      CHECK_EQ(job_->ConnectGpu(target, Way::kSend, id).text, "");
    } else if (self_.rank == target) {
      CHECK_EQ(job_->ConnectGpu(source, Way::kRecv, id).text, "");
    }
  }

  Rank& self_;
  std::shared_ptr<GpuDevice> device_;
  CudaStream stream_ = nullptr;
  std::unique_ptr<Job> job_;
  int group_ = -1;
};

std::string Failure(Job& job) {
  std::string text;
  CHECK(GpuRank::Eventually([&] { return job.Failure(&text); }));
  return text;
}

void MessagesAndTheEnd(Rank& self) {
  GpuJob gpu(self);
  const int next = (self.rank + 1) % 3, previous = (self.rank + 2) % 3;
  Memory in(kBytes, 0), out(kBytes, self.rank);
  const TicketPtr received = gpu.Recv(previous, 1, in.buffer());
  CHECK_EQ(gpu.Send(next, 1, out.buffer()).text, "");
  Outcome told;
  gpu.job().gpu()->transport.Join(received->id(), gpu.stream(), told.Handler());
  CHECK_EQ(told.Await().text, "");
  CHECK_EQ(gpu.Flush().text, "");
  CHECK(in.Text() == Memory::Pattern(kBytes, previous));
  // Over the host as ever.
  self.Send(gpu.job(), next, 2, "text");
  CHECK_EQ(self.Recv(gpu.job(), previous, 2, 4), "text");
  CHECK_EQ(gpu.job().Close(20).text, "");
  std::string failure;
  CHECK(!gpu.job().Failure(&failure));
  self.Meet();
}

// UCX's monitor sees it, and everything that waits on a GPU ends: for the dead rank,
// for another one, in a group.
void DeathEndsWhatWaitsOnTheGpu(Rank& self) {
  GpuJob gpu(self);
  if (self.rank == 1) {
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    raise(SIGKILL);
  }
  std::vector<Memory> memory;
  for (int i = 0; i < 4; ++i) memory.emplace_back(kBytes, 0);
  const std::vector<TicketPtr> waits = {gpu.Recv(1, 1, memory[0].Give()),
                                        gpu.Recv(2 - self.rank, 2, memory[1].Give()),
                                        gpu.Sum(memory[2].Give())};
  Outcome joined;
  gpu.job().gpu()->transport.Join(waits[0]->id(), gpu.stream(), joined.Handler());
  CHECK_EQ(gpu.Send(1, 3, memory[3].Give()).text, "");
  self.Meet();
  const double start = Now();
  for (const TicketPtr& ticket : waits) {
    CHECK(ticket->WaitFor(kTestSeconds));
    CHECK(ticket->status().code == Code::kUnavailable);
    CHECK_EQ(ticket->status().text.find("rank 1 died ("), 0u);
    CHECK_HAS(ticket->status().text, ticket->Describe());
  }
  CHECK(Now() - start < 3);
  CHECK_EQ(gpu.Flush().text.find("rank 1 died ("), 0u);
  CHECK_EQ(gpu.Send(1, 4, Memory(4, 0).Give()).text.find("rank 1 died ("), 0u);
  for (const Memory& each : memory) {
    CHECK(GpuRank::Eventually([&] { return !each.IsKept(); }));
  }
  CHECK_EQ(Failure(gpu.job()).find("rank 1 died ("), 0u);
  CHECK_EQ(gpu.job().Close(20).text, "");
}

// NCCL's threads notice a death before UCX tells of it, or at a rank that is well.
void ADeathIsNamedDespiteErrorsOfNccl(Rank& self) {
  GpuJob gpu(self);
  if (self.rank == 1) {
    self.Meet();
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    raise(SIGKILL);
  }
  const TicketPtr ticket = gpu.Recv(2 - self.rank, 1, Memory(kBytes, 0).Give());
  self.Meet();
  Fakes().inject(6);
  CHECK(ticket->WaitFor(kTestSeconds));
  CHECK_EQ(ticket->status().text.find("rank 1 died ("), 0u);
  CHECK_EQ(Failure(gpu.job()).find("rank 1 died ("), 0u);
  CHECK_EQ(gpu.job().Close(20).text, "");
}

// Nobody has died: the rank that sees the error says what it was, and stops all.
void AnErrorOfNcclFailsTheJob(Rank& self) {
  GpuJob gpu(self);
  const TicketPtr ticket = gpu.Recv((self.rank + 1) % 3, 1, Memory(kBytes, 0).Give());
  self.Meet();
  if (self.rank == 0) Fakes().inject(6);
  const std::string expected =
      "rank 0 lost a connection by NCCL: messages from rank 1: a connection of NCCL "
      "failed: NCCL: remote process exited or there was a network error (6)";
  CHECK_EQ(Failure(gpu.job()), expected);
  CHECK(ticket->WaitFor(kTestSeconds));
  CHECK_EQ(ticket->status().text, expected + ": " + ticket->Describe());
  CHECK_EQ(gpu.job().Close(20).text, "");
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main() {
  using namespace smp::testing;
  RunRanks("GPU job: messages and the end", 3, MessagesAndTheEnd);
  RunRanks("GPU job: death ends what waits", 3, DeathEndsWhatWaitsOnTheGpu,
           {0, SIGKILL, 0});
  RunRanks("GPU job: a death is named despite errors", 3,
           ADeathIsNamedDespiteErrorsOfNccl, {0, SIGKILL, 0});
  RunRanks("GPU job: an error fails the job", 3, AnErrorOfNcclFailsTheJob);
}
