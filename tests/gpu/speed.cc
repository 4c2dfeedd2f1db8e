// Bandwidth and latency of the transport beside those of ncclSend and ncclRecv alone,
// in one run, in turn; see run.sh. Nothing waits on the host in between: a message
// waits for the one before on the stream of computations, as in a step.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace smp::testing {
namespace {

Machine machine;

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// NCCL as one would use it by hand: a communicator, everything on one stream.
class Raw {
 public:
  explicit Raw(GpuSide& gpu) : gpu_(gpu) {
    const NcclId id = gpu.ShareId();
    const GpuDevice::Current current(*gpu.device());
    Check(gpu.nccl().CommInitRank(&comm_, 2, id, gpu.process().rank));
  }
  ~Raw() {
    const GpuDevice::Current current(*gpu_.device());
    gpu_.nccl().CommDestroy(comm_);
  }
  Raw(const Raw&) = delete;

  void Send(const Buffer& buffer) {
    const GpuDevice::Current current(*gpu_.device());
    Check(gpu_.nccl().Send(buffer.data, buffer.bytes, kNcclInt8, gpu_.peer(), comm_,
                           gpu_.stream()));
  }

  void Recv(const Buffer& buffer) {
    const GpuDevice::Current current(*gpu_.device());
    Check(gpu_.nccl().Recv(buffer.data, buffer.bytes, kNcclInt8, gpu_.peer(), comm_,
                           gpu_.stream()));
  }

 private:
  void Check(NcclResult result) { CHECK_EQ(gpu_.nccl().Text(result), Good()); }
  std::string Good() const { return gpu_.nccl().Text(kNcclSuccess); }

  GpuSide& gpu_;
  NcclComm comm_ = nullptr;
};

// The same over the transport: the stream of computations joins each message.
class Ours {
 public:
  explicit Ours(GpuSide& gpu) : gpu_(gpu) {}

  void Send(const Buffer& buffer) {
    uint64_t id = 0;
    gpu_.Send(buffer, false, &id);
    last_ = id;
  }

  void Recv(const Buffer& buffer) {
    uint64_t id = 0;
    gpu_.Recv(buffer, false, &id);
    gpu_.Join(id);
  }

  // A stream does not wait for what it sends, unless it is told to.
  void JoinSends() {
    if (last_ != 0) gpu_.Join(last_);
    last_ = 0;
  }

 private:
  GpuSide& gpu_;
  uint64_t last_ = 0;
};

void JoinSends(Raw&) {}
void JoinSends(Ours& ours) { ours.JoinSends(); }

// Seconds until `count` messages from rank 0 have arrived at rank 1.
template <typename How>
double OneWay(GpuSide& gpu, How& how, const Buffer& buffer, int count) {
  gpu.process().Meet();
  const double start = Now();
  for (int i = 0; i < count; ++i) {
    gpu.process().rank == 0 ? how.Send(buffer) : how.Recv(buffer);
  }
  JoinSends(how);
  gpu.Synchronize();
  return Now() - start;
}

// Seconds for a message to rank 1 and back, of `count` in a row.
template <typename How>
double ThereAndBack(GpuSide& gpu, How& how, const Buffer& buffer, int count) {
  gpu.process().Meet();
  const double start = Now();
  for (int i = 0; i < count; ++i) {
    if (gpu.process().rank == 0) {
      how.Send(buffer);
      how.Recv(buffer);
    } else {
      how.Recv(buffer);
      how.Send(buffer);
    }
  }
  JoinSends(how);
  gpu.Synchronize();
  return (Now() - start) / count;
}

void Measure(Process& self) {
  GpuSide gpu(self, machine);
  Raw raw(gpu);
  Ours ours(gpu);
  const int repeats = machine.small ? 5 : 15;
  const auto say = [&](const char* format, auto... values) {
    if (self.rank == 1) std::printf(format, values...);
  };
  say("%-12s %16s %16s %8s\n", "one way", "NCCL (GB/s)", "smp_tf (GB/s)", "ratio");
  double bandwidth_ratio = 0;
  for (const size_t bytes : {size_t{64} << 10, size_t{1} << 20, size_t{64} << 20}) {
    const int count = machine.small ? 3 : bytes > (1 << 20) ? 16 : 100;
    const Buffer buffer = gpu.Allocate(bytes);
    std::vector<double> theirs, own;
    for (int i = 0; i <= repeats; ++i) {
      const double a = OneWay(gpu, raw, buffer, count);
      const double b = OneWay(gpu, ours, buffer, count);
      if (i == 0) continue;  // connects, and warms up
      theirs.push_back(1e-9 * static_cast<double>(bytes) * count / a);
      own.push_back(1e-9 * static_cast<double>(bytes) * count / b);
    }
    bandwidth_ratio = Median(own) / Median(theirs);
    say("%7zu KiB  %16.3f %16.3f %8.3f\n", bytes >> 10, Median(theirs), Median(own),
        bandwidth_ratio);
  }
  const Buffer word = gpu.Allocate(8);
  const int rounds = machine.small ? 10 : 200;
  std::vector<double> theirs, own;
  for (int i = 0; i <= repeats; ++i) {
    const double a = ThereAndBack(gpu, raw, word, rounds);
    const double b = ThereAndBack(gpu, ours, word, rounds);
    if (i == 0) continue;
    theirs.push_back(1e6 * a / 2);
    own.push_back(1e6 * b / 2);
  }
  const double latency_ratio = Median(own) / Median(theirs);
  say("%-12s %16s %16s %8s\n", "latency", "NCCL (us)", "smp_tf (us)", "ratio");
  say("%9s    %16.2f %16.2f %8.3f\n", "8 bytes", Median(theirs), Median(own),
      latency_ratio);
  say("bandwidth_64mb_ratio=%.3f latency_ratio=%.3f\n", bandwidth_ratio, latency_ratio);
  std::fflush(stdout);
  self.Meet();
}

}  // namespace
}  // namespace smp::testing

int main(int count, char** arguments) {
  using namespace smp::testing;
  machine = Machine::FromArguments(count, arguments);
  RunProcesses("speed", 2, Measure);
}
