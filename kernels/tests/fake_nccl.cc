// A fake of NCCL over shared memory, for tests only: libfake_nccl.so.
//
// Of CUDA it needs no more than cuLaunchHostFunc: an operation is a function on its
// stream, which keeps the stream until it is over. What matters to those who call it is
// as in NCCL: who waits for whom (the others when a communicator is made, the peer's
// call at a first message, the device when one is given up), that operations match by
// order, and that those of a group make progress side by side.
#include "fake_nccl.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <utility>

#include "fake_comm.h"
#include "fake_cuda.h"

namespace smp {

struct NcclCommTag {
  std::shared_ptr<FakeComm> comm;
};

namespace {

constexpr NcclResult kCudaError = 1;
constexpr NcclResult kInternalError = 3;
constexpr NcclResult kInvalidArgument = 4;
constexpr NcclResult kInvalidUsage = 5;
constexpr int kSettles = 3;

struct State {
  std::atomic<int> aborts{0}, operations{0}, launches{0}, mistakes{0};
  std::atomic<NcclResult> refusal{kNcclSuccess}, async_error{kNcclSuccess};
  std::mutex mutex;
  std::map<NcclComm, std::shared_ptr<FakeComm>> comms;

  State() {
    const char* const text = std::getenv("FAKE_NCCL_ASYNC_ERROR");
    if (text != nullptr) async_error = std::atoi(text);
    const char* const blocks = std::getenv("NCCL_COMM_BLOCKING");
    returns_early = blocks != nullptr && std::atoi(blocks) == 0;
  }

  bool returns_early = false;
};

// Never destroyed: work on streams outlives main().
State& Get() {
  static auto* const state = new State;
  return *state;
}

// Of the calling thread.
thread_local int depth = 0;
thread_local NcclResult group_error = kNcclSuccess;
thread_local std::vector<FakeLaunch> group;

__attribute__((destructor)) void Leave() { ForgetFakeBoards(); }

NcclResult Mistake(NcclResult result, const char* what) {
  if (!FakeIsQuiet()) std::fprintf(stderr, "fake NCCL: %s (%d)\n", what, result);
  ++Get().mistakes;
  return result;
}

std::shared_ptr<FakeComm> Find(NcclComm comm) {
  std::lock_guard<std::mutex> lock(Get().mutex);
  const auto found = Get().comms.find(comm);
  return found == Get().comms.end() ? nullptr : found->second;
}

// What a call says that has gone well, and may go on in NCCL's own thread.
NcclResult InProgress(FakeComm* comm) {
  if (!Get().returns_early) return kNcclSuccess;
  comm->unsettled = kSettles;
  return kNcclInProgress;
}

void RunOnStream(void* argument) {
  const std::unique_ptr<FakeLaunch> launch(static_cast<FakeLaunch*>(argument));
  launch->Run();
  --launch->comm->pending;
}

NcclResult LaunchAll(std::vector<FakeLaunch> launches) {
  for (FakeLaunch& launch : launches) launch.Announce();
  for (FakeLaunch& launch : launches) {
    if (!launch.AwaitPeers()) return kInternalError;
  }
  NcclResult result = kNcclSuccess;
  for (FakeLaunch& launch : launches) {
    result = InProgress(launch.comm.get());
    ++Get().launches;
    Get().operations += launch.operations;
    ++launch.comm->pending;
    auto work = std::make_unique<FakeLaunch>(std::move(launch));
    if (cuLaunchHostFunc(work->stream, RunOnStream, work.get()) != kCudaSuccess) {
      --work->comm->pending;
      return kCudaError;
    }
    work.release();
  }
  return result;
}

// Where the operations of a communicator on this stream go.
FakeLaunch* LaunchOf(const std::shared_ptr<FakeComm>& comm, CudaStream stream) {
  for (FakeLaunch& each : group) {
    if (each.comm == comm) return each.stream == stream ? &each : nullptr;
  }
  group.emplace_back();
  group.back().comm = comm;
  group.back().stream = stream;
  return &group.back();
}

// An operation of its own, or one more of the group.
template <typename Add>
NcclResult Enqueue(NcclComm comm, CudaStream stream, const Add& add) {
  const auto found = Find(comm);
  NcclResult result = Get().refusal.exchange(kNcclSuccess);
  FakeLaunch* launch = nullptr;
  if (result == kNcclSuccess) {
    if (found == nullptr) {
      result = Mistake(kInvalidArgument, "an operation on no communicator");
    } else if (found->unsettled > 0) {
      result = Mistake(kInvalidUsage, "an operation before the last call is over");
    } else if ((launch = LaunchOf(found, stream)) == nullptr) {
      result = Mistake(kInvalidUsage, "two streams in a group");
    } else {
      result = add(launch);
      ++launch->operations;
    }
  }
  if (depth > 0) {
    if (result != kNcclSuccess) group_error = result;
    return result;
  }
  auto launches = std::exchange(group, {});
  return result == kNcclSuccess ? LaunchAll(std::move(launches)) : result;
}

NcclResult Move(bool sends, void* data, size_t count, NcclType type, int peer,
                NcclComm comm, CudaStream stream) {
  return Enqueue(comm, stream, [&](FakeLaunch* launch) {
    const FakeComm& own = *launch->comm;
    const size_t size = SizeOfFakeType(type);
    if (size == 0 || peer < 0 || peer >= own.size()) {
      return Mistake(kInvalidArgument, "no such type, or no such peer");
    }
    FakeRing* const ring = sends ? own.Ring(FakeComm::kMessages, own.rank(), peer)
                                 : own.Ring(FakeComm::kMessages, peer, own.rank());
    launch->moves.push_back({ring, sends, static_cast<char*>(data), count * size});
    return kNcclSuccess;
  });
}

NcclResult End(NcclComm comm) {
  const auto found = Find(comm);
  if (found == nullptr) return Mistake(kInvalidArgument, "the end of no communicator");
  {
    std::lock_guard<std::mutex> lock(Get().mutex);
    Get().comms.erase(comm);
  }
  // It frees device memory, for which CUDA waits until all streams are done.
  const CudaResult result = cuCtxSynchronize();
  delete comm;
  return result == kCudaSuccess ? kNcclSuccess : kCudaError;
}

}  // namespace
}  // namespace smp

using namespace smp;

extern "C" {

void fake_nccl_counts(FakeNcclCounts* counts) {
  State& state = Get();
  std::lock_guard<std::mutex> lock(state.mutex);
  counts->communicators = static_cast<int>(state.comms.size());
  counts->aborts = state.aborts;
  counts->operations = state.operations;
  counts->launches = state.launches;
  counts->mismatches = fake_mismatches;
  counts->mistakes = state.mistakes;
}

void fake_nccl_inject(NcclResult result) { Get().async_error = result; }

void fake_nccl_refuse(NcclResult result) { Get().refusal = result; }

NcclResult ncclGetVersion(int* version) {
  *version = 23003;
  return kNcclSuccess;
}

NcclResult ncclGetUniqueId(NcclId* id) {
  std::random_device random;
  std::memset(id->bytes, 0, sizeof id->bytes);
  std::snprintf(id->bytes, sizeof id->bytes, "/smp_fake_nccl_%d_%08x%08x",
                static_cast<int>(getpid()), random(), random());
  return kNcclSuccess;
}

NcclResult ncclCommInitRank(NcclComm* comm, int size, NcclId id, int rank) {
  *comm = nullptr;
  CudaContext context = nullptr;
  cuCtxGetCurrent(&context);
  if (context == nullptr) return Mistake(kInvalidUsage, "ncclCommInitRank: no context");
  auto made = std::make_shared<FakeComm>();
  const std::string name(id.bytes, strnlen(id.bytes, sizeof id.bytes));
  const NcclResult result = made->Open(name, size, rank);
  if (result != kNcclSuccess) return Mistake(result, "ncclCommInitRank");
  *comm = new NcclCommTag{made};
  std::lock_guard<std::mutex> lock(Get().mutex);
  Get().comms[*comm] = made;
  return InProgress(made.get());
}

NcclResult ncclCommDestroy(NcclComm comm) {
  const auto found = Find(comm);
  if (found != nullptr && found->pending > 0) {
    Mistake(kInvalidUsage, "ncclCommDestroy of a communicator that has work");
  }
  return End(comm);
}

NcclResult ncclCommAbort(NcclComm comm) {
  if (const auto found = Find(comm)) found->aborted = true;
  ++Get().aborts;
  return End(comm);
}

NcclResult ncclCommGetAsyncError(NcclComm comm, NcclResult* error) {
  const auto found = Find(comm);
  if (found == nullptr) return Mistake(kInvalidArgument, "ncclCommGetAsyncError");
  const bool is_over = found->unsettled == 0 || --found->unsettled == 0;
  *error = is_over ? Get().async_error.load() : kNcclInProgress;
  return kNcclSuccess;
}

NcclResult ncclSend(const void* data, size_t count, NcclType type, int peer,
                    NcclComm comm, CudaStream stream) {
  return Move(true, const_cast<void*>(data), count, type, peer, comm, stream);
}

NcclResult ncclRecv(void* data, size_t count, NcclType type, int peer, NcclComm comm,
                    CudaStream stream) {
  return Move(false, data, count, type, peer, comm, stream);
}

NcclResult ncclAllReduce(const void* from, void* to, size_t count, NcclType type,
                         NcclReduction reduction, NcclComm comm, CudaStream stream) {
  return Enqueue(comm, stream, [&](FakeLaunch* launch) {
    const FakeComm& own = *launch->comm;
    const size_t bytes = count * SizeOfFakeType(type);
    if (SizeOfFakeType(type) == 0 || reduction != kNcclSum) {
      return Mistake(kInvalidArgument, "only sums, and of few types, are faked");
    }
    auto sum = std::make_unique<FakeSum>();
    sum->from = from;
    sum->to = to;
    sum->count = count;
    sum->type = type;
    sum->parts.resize(static_cast<size_t>(own.size()));
    for (int peer = 0; peer < own.size(); ++peer) {
      if (peer == own.rank()) continue;
      auto& part = sum->parts[static_cast<size_t>(peer)];
      part.resize(bytes);
      launch->moves.push_back({own.Ring(FakeComm::kSums, own.rank(), peer), true,
                               static_cast<char*>(const_cast<void*>(from)), bytes});
      launch->moves.push_back(
          {own.Ring(FakeComm::kSums, peer, own.rank()), false, part.data(), bytes});
    }
    launch->sums.push_back(std::move(sum));
    return kNcclSuccess;
  });
}

NcclResult ncclGroupStart() {
  ++depth;
  return kNcclSuccess;
}

NcclResult ncclGroupEnd() {
  if (depth == 0) return Mistake(kInvalidUsage, "ncclGroupEnd without a start");
  if (--depth > 0) return kNcclSuccess;
  auto launches = std::exchange(group, {});
  const NcclResult error = std::exchange(group_error, kNcclSuccess);
  return error == kNcclSuccess ? LaunchAll(std::move(launches)) : error;
}

const char* ncclGetErrorString(NcclResult result) {
  switch (result) {
    case kNcclSuccess:
      return "no error";
    case kCudaError:
      return "unhandled cuda error";
    case kInternalError:
      return "internal error";
    case kInvalidArgument:
      return "invalid argument";
    case kInvalidUsage:
      return "invalid usage";
    case 6:
      return "remote process exited or there was a network error";
    case kNcclInProgress:
      return "NCCL operation in progress";
    default:
      return "unhandled system error";
  }
}

const char* ncclGetLastError(NcclComm) { return ""; }

}  // extern "C"
