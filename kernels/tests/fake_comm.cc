// Communicators of the fake NCCL, see fake_nccl.cc. For tests only.
#include "fake_comm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

#include "fake_cuda.h"

namespace smp {
namespace {

constexpr NcclResult kSystemError = 2;
constexpr NcclResult kInvalidArgument = 4;
constexpr NcclResult kInvalidUsage = 5;

// Shared memory that has a name as yet. Never destroyed.
struct Names {
  std::mutex mutex;
  std::set<std::string> names;
};

Names& GetNames() {
  static auto* const names = new Names;
  return *names;
}

// Half of a float, as bfloat16 is; the compilers of today have no type for it yet.
struct Bfloat16 {
  explicit Bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  Bfloat16() = default;
  float operator+(Bfloat16 other) const { return Wide() + other.Wide(); }

 private:
  float Wide() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  uint16_t bits = 0;
};

template <typename Type>
void AddAs(const FakeSum& sum) {
  std::vector<Type> total(sum.count, Type(0));
  // In the order of the ranks, so that all of them get the same bits.
  for (const auto& part : sum.parts) {
    const void* const values = part.empty() ? sum.from : part.data();
    for (size_t i = 0; i < sum.count; ++i) {
      Type value;
      std::memcpy(&value, static_cast<const char*>(values) + i * sizeof value,
                  sizeof value);
      total[i] = static_cast<Type>(total[i] + value);
    }
  }
  std::memcpy(sum.to, total.data(), sum.count * sizeof(Type));
}

}  // namespace

std::atomic<int> fake_mismatches{0};

void FakePause::Wait() {
  if (++count_ < 20) return std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::microseconds(count_ < 200 ? 20 : 200));
}

// --- rings

uint64_t FakeRing::Write(const char* from, uint64_t bytes) {
  const uint64_t at = written.load(std::memory_order_relaxed);
  const uint64_t room = kBytes - (at - read.load(std::memory_order_acquire));
  const uint64_t count = std::min({bytes, room, kBytes - at % kBytes});
  if (count > 0) std::memcpy(data + at % kBytes, from, count);
  written.store(at + count, std::memory_order_release);
  return count;
}

uint64_t FakeRing::Read(char* to, uint64_t bytes) {
  const uint64_t at = read.load(std::memory_order_relaxed);
  const uint64_t there = written.load(std::memory_order_acquire) - at;
  const uint64_t count = std::min({bytes, there, kBytes - at % kBytes});
  if (to != nullptr && count > 0) std::memcpy(to, data + at % kBytes, count);
  read.store(at + count, std::memory_order_release);
  return count;
}

bool FakeMove::Step() {
  uint64_t steps = 0;
  uint64_t& header = sends ? bytes : arriving;
  if (header_moved < sizeof header) {
    char* const at = reinterpret_cast<char*>(&header) + header_moved;
    const uint64_t rest = sizeof header - header_moved;
    steps += sends ? ring->Write(at, rest) : ring->Read(at, rest);
    header_moved += steps;
    if (header_moved < sizeof header) return steps > 0;
    if (!sends && arriving != bytes) {
      if (!FakeIsQuiet()) {
        std::fprintf(stderr, "fake NCCL: %llu bytes expected, %llu sent\n",
                     static_cast<unsigned long long>(bytes),
                     static_cast<unsigned long long>(arriving));
      }
      ++fake_mismatches;
    }
  }
  // What is too much is thrown away.
  const uint64_t end = moved < bytes ? std::min(bytes, header) : header;
  if (moved < end) {
    const uint64_t count =
        sends ? ring->Write(data + moved, end - moved)
              : ring->Read(moved < bytes ? data + moved : nullptr, end - moved);
    moved += count;
    steps += count;
  }
  over = moved == header;
  return steps > 0 || over;
}

// --- sums

size_t SizeOfFakeType(NcclType type) {
  switch (type) {
    case kNcclInt8:
    case kNcclUint8:
      return 1;
    case kNcclFloat16:
    case kNcclBfloat16:
      return 2;
    case kNcclInt32:
    case kNcclUint32:
    case kNcclFloat32:
      return 4;
    case kNcclInt64:
    case kNcclUint64:
    case kNcclFloat64:
      return 8;
    default:
      return 0;
  }
}

void FakeSum::Add() const {
  switch (type) {
    case kNcclInt8:
    case kNcclUint8:
      return AddAs<uint8_t>(*this);
    case kNcclInt32:
    case kNcclUint32:
      return AddAs<uint32_t>(*this);
    case kNcclInt64:
    case kNcclUint64:
      return AddAs<uint64_t>(*this);
    case kNcclFloat16:
      return AddAs<_Float16>(*this);
    case kNcclBfloat16:
      return AddAs<Bfloat16>(*this);
    case kNcclFloat32:
      return AddAs<float>(*this);
    case kNcclFloat64:
      return AddAs<double>(*this);
    default:
      return;
  }
}

// --- launches

void FakeLaunch::Announce() {
  for (FakeMove& move : moves) {
    (move.sends ? move.ring->sender_called : move.ring->receiver_called) = 1;
  }
}

bool FakeLaunch::AwaitPeers() {
  FakePause pause;
  for (FakeMove& move : moves) {
    auto& called = move.sends ? move.ring->receiver_called : move.ring->sender_called;
    while (called == 0) {
      if (comm->aborted) return false;
      pause.Wait();
    }
  }
  return true;
}

void FakeLaunch::Run() {
  FakePause pause;
  while (!comm->aborted) {
    bool progress = false;
    std::set<FakeRing*> busy;
    for (FakeMove& move : moves) {
      if (move.over || busy.count(move.ring) > 0) continue;
      progress |= move.Step();
      if (!move.over) busy.insert(move.ring);
    }
    if (busy.empty()) {
      for (const auto& sum : sums) sum->Add();
      return;
    }
    if (progress) {
      pause = {};
    } else {
      pause.Wait();
    }
  }
}

// --- communicators

NcclResult FakeComm::Open(const std::string& name, int size, int rank) {
  if (size < 1 || size > kMaxRanks || rank < 0 || rank >= size) return kInvalidArgument;
  size_ = size;
  rank_ = rank;
  bytes_ = sizeof(FakeBoard) + sizeof(FakeRing) * kKinds * size * size;
  {
    std::lock_guard<std::mutex> lock(GetNames().mutex);
    GetNames().names.insert(name);
  }
  const int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0) return kSystemError;
  void* memory = MAP_FAILED;
  if (ftruncate(file, static_cast<off_t>(bytes_)) == 0) {
    memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  if (memory == MAP_FAILED) return kSystemError;
  board_ = static_cast<FakeBoard*>(memory);
  int none = 0;
  if (!board_->size.compare_exchange_strong(none, size) && none != size) {
    return kInvalidArgument;
  }
  if (board_->taken[rank].exchange(1) != 0) return kInvalidUsage;
  const bool is_last = ++board_->arrived == size;
  FakePause pause;
  while (board_->arrived < size) pause.Wait();
  if (is_last) shm_unlink(name.c_str());
  std::lock_guard<std::mutex> lock(GetNames().mutex);
  GetNames().names.erase(name);
  return kNcclSuccess;
}

FakeComm::~FakeComm() {
  if (board_ != nullptr) munmap(board_, bytes_);
}

void ForgetFakeBoards() {
  std::lock_guard<std::mutex> lock(GetNames().mutex);
  for (const std::string& name : GetNames().names) shm_unlink(name.c_str());
}

}  // namespace smp
