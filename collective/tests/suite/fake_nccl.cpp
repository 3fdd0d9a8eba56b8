// NCCL's C interface in the memory of one process, for tests: it moves bytes between threads, answers as late as
// NCCL does, and counts every call that breaks NCCL's rules.
//
// Rules it watches: sends and receives lie inside a group and are of bytes; a communicator is not used after its
// abort; `fake_live` counts those that were not aborted.
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalid = 4, kRemote = 6, kInProgress = 7;

struct Id {
  char bytes[128];
};

struct Group {
  int size = 0;
  std::vector<bool> here, gone;
  // By sender and receiver, what is under way.
  std::map<std::pair<int, int>, std::deque<std::vector<char>>> mail;
};

struct Receive {
  void* target;
  size_t bytes;
  int from;
};

struct Comm {
  std::shared_ptr<Group> group;
  int rank;
  bool aborted = false;
  bool failed = false;
  int looks = 0;
  std::vector<Receive> wanted;
  float* sum = nullptr;
  size_t floats = 0;
  bool sum_sent = false;
};

std::mutex mutex;
std::map<std::string, std::shared_ptr<Group>> groups;
unsigned next_id = 0;
int violations = 0;
int live = 0;
thread_local int depth = 0;
thread_local Comm* watched = nullptr;

bool allowed(Comm* comm) {
  if (comm->aborted) ++violations;
  return !comm->aborted;
}

void post(Comm* comm, int to, const void* data, size_t bytes) {
  const char* begin = static_cast<const char*>(data);
  comm->group->mail[{comm->rank, to}].emplace_back(begin, begin + bytes);
}

// Takes what has come; whether all has, or a peer that owes something is gone.
bool settle(Comm* comm) {
  auto& group = *comm->group;
  if (comm->sum != nullptr && !comm->sum_sent) {
    for (int to = 0; to < group.size; ++to)
      if (to != comm->rank) post(comm, to, comm->sum, comm->floats * sizeof(float));
    comm->sum_sent = true;
  }
  for (auto it = comm->wanted.begin(); it != comm->wanted.end();) {
    auto& box = group.mail[{it->from, comm->rank}];
    if (box.empty()) {
      if (group.gone[it->from]) comm->failed = true;
      ++it;
      continue;
    }
    std::memcpy(it->target, box.front().data(), std::min(it->bytes, box.front().size()));
    box.pop_front();
    it = comm->wanted.erase(it);
  }
  if (comm->sum == nullptr) return comm->wanted.empty();
  for (int from = 0; from < group.size; ++from) {
    if (from == comm->rank) continue;
    if (group.mail[{from, comm->rank}].empty()) {
      if (group.gone[from]) comm->failed = true;
      return false;
    }
  }
  for (int from = 0; from < group.size; ++from) {
    if (from == comm->rank) continue;
    auto& box = group.mail[{from, comm->rank}];
    const float* values = reinterpret_cast<const float*>(box.front().data());
    for (size_t i = 0; i < comm->floats; ++i) comm->sum[i] += values[i];
    box.pop_front();
  }
  comm->sum = nullptr;
  return true;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = 22800;
  return kSuccess;
}

int ncclGetUniqueId(Id* id) {
  std::lock_guard<std::mutex> lock(mutex);
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->bytes, sizeof id->bytes, "group %u", next_id++);
  return kSuccess;
}

int ncclCommInitRankConfig(Comm** out, int size, Id id, int rank, void* config) {
  std::lock_guard<std::mutex> lock(mutex);
  // The configuration: its size, a mark and the version, then `blocking`, which must be off.
  struct Head {
    size_t size;
    unsigned magic, version;
    int blocking;
  };
  const Head* head = static_cast<const Head*>(config);
  if (head->size != 80 || head->magic != 0xcafebeef || head->blocking != 0) return kInvalid;
  auto& group = groups[id.bytes];
  if (!group) {
    group = std::make_shared<Group>();
    group->size = size;
    group->here.resize(size);
    group->gone.resize(size);
  }
  if (rank < 0 || rank >= size || group->size != size || group->here[rank]) return kInvalid;
  group->here[rank] = true;
  *out = new Comm{group, rank};
  ++live;
  return kInProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!allowed(comm)) return kInvalid;
  for (bool here : comm->group->here) {
    if (!here) {
      *state = kInProgress;
      return kSuccess;
    }
  }
  watched = comm;
  settle(comm);
  // Each call is under way for two looks before it is on the stream.
  *state = comm->failed ? kRemote : (comm->looks++ % 3 < 2 ? kInProgress : kSuccess);
  return kSuccess;
}

int ncclCommAbort(Comm* comm) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!allowed(comm)) return kInvalid;
  comm->aborted = true;
  comm->group->gone[comm->rank] = true;
  --live;
  return kSuccess;  // Kept, so that a later use is seen.
}

int ncclGroupStart() {
  ++depth;
  return kSuccess;
}

int ncclGroupEnd() {
  std::lock_guard<std::mutex> lock(mutex);
  if (--depth < 0) ++violations;
  return kInProgress;
}

int ncclSend(const void* data, size_t bytes, int type, int peer, Comm* comm, void*) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!allowed(comm)) return kInvalid;
  if (depth != 1 || type != 1) ++violations;
  post(comm, peer, data, bytes);
  return kInProgress;
}

int ncclRecv(void* target, size_t bytes, int type, int peer, Comm* comm, void*) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!allowed(comm)) return kInvalid;
  if (depth != 1 || type != 1) ++violations;
  comm->wanted.push_back({target, bytes, peer});
  return kInProgress;
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, Comm* comm, void*) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!allowed(comm)) return kInvalid;
  if (from != to || type != 7 || op != 0) ++violations;
  comm->sum = static_cast<float*>(to);
  comm->floats = count;
  comm->sum_sent = false;
  return kInProgress;
}

const char* ncclGetErrorString(int error) {
  return error == kRemote ? "remote process exited or there was a network error" : "invalid argument";
}

const char* ncclGetLastError(Comm*) { return "of the fake"; }

// What a mark in the stream of this thread asks: whether all is done that was asked of the communicator that
// the thread looked at last.
int fake_is_done() {
  std::lock_guard<std::mutex> lock(mutex);
  return settle(watched) ? 1 : 0;
}

int fake_violations() {
  std::lock_guard<std::mutex> lock(mutex);
  return violations;
}

int fake_live() {
  std::lock_guard<std::mutex> lock(mutex);
  return live;
}

}  // extern "C"
