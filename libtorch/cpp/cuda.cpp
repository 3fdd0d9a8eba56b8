// Streams, events, graphs and memory of CUDA devices, through what libtorch offers without CUDA's headers.
//
// Contract of every function here: as in shim.cpp. Without libtorch_cuda each returns an error.
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <memory>
#include <new>
#include <utility>

#include "guarded.h"

namespace {

c10::Device cuda(int ordinal) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(ordinal)}; }

c10::impl::VirtualGuardImpl guard_of(int ordinal) {
  c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  TORCH_CHECK(ordinal >= 0 && ordinal < guard.deviceCount(), "no CUDA device ", ordinal);
  return guard;
}

// A function of libtorch_cuda by its mangled name: the program is not linked to that library.
template <class F>
F* symbol(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  TORCH_CHECK(found, "libtorch_cuda lacks ", name, ": it is of another version than this program was built for");
  return reinterpret_cast<F*>(found);
}

// at::cuda::CUDAGraph, whose header needs CUDA's. Its members are called by name, and it lies in room that is
// larger than any version of it.
struct Graph {
  static constexpr size_t kRoom = 8192;
  alignas(64) unsigned char room[kRoom] = {};
  bool made = false;

  void* self() { return room; }
  ~Graph() {
    if (made) symbol<void(void*)>("_ZN2at4cuda9CUDAGraphD1Ev")(self());
  }
};

// cudaStreamCaptureModeThreadLocal: other threads may go on with what is not captured.
constexpr int kThreadLocal = 1;

struct Marker {
  c10::Event event{c10::DeviceType::CUDA};
};

}  // namespace

extern "C" {

// Makes `ordinal` the current device of this thread, and a stream of its own the current one. A graph can be
// captured on it, which the default stream does not allow.
const char* percheron_cuda_enter(int ordinal) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    auto guard = guard_of(ordinal);
    guard.setDevice(cuda(ordinal));
    guard.exchangeStream(guard.getNewStream(cuda(ordinal), 0));
  });
}

// The cudaStream_t that is current on this thread.
const char* percheron_cuda_stream(int ordinal, void** out) {
  return guarded([&] { *out = guard_of(ordinal).getStream(cuda(ordinal)).native_handle(); });
}

// Waits until all work of the current stream is done.
const char* percheron_cuda_synchronize(int ordinal) {
  return guarded([&] {
    auto guard = guard_of(ordinal);
    guard.synchronizeStream(guard.getStream(cuda(ordinal)));
  });
}

// The most bytes that tensors have held on the device.
const char* percheron_cuda_peak(int ordinal, size_t* out) {
  return guarded([&] {
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(ordinal));
    *out = static_cast<size_t>(stats.allocated_bytes[0].peak);
  });
}

// The PCI address of a device, DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal digits, by which the driver knows it too.
const char* percheron_cuda_bus_id(int ordinal, char* out, size_t capacity) {
  return guarded([&] {
    guard_of(ordinal);
    auto* ask = symbol<int(char*, int, int)>("cudaDeviceGetPCIBusId");
    const int error = ask(out, static_cast<int>(capacity), ordinal);
    TORCH_CHECK(error == 0, "CUDA does not say where device ", ordinal, " is: error ", error);
  });
}

const char* percheron_marker_new(Marker** out) {
  return guarded([&] { *out = new Marker; });
}

// Marks the end of what the current stream holds now.
const char* percheron_marker_record(Marker* marker, int ordinal) {
  return guarded([&] { marker->event.record(guard_of(ordinal).getStream(cuda(ordinal))); });
}

// 1 if all that was before the mark is done. Never blocks.
const char* percheron_marker_is_passed(const Marker* marker, int* out) {
  return guarded([&] { *out = marker->event.query(); });
}

void percheron_marker_drop(Marker* marker) { delete marker; }

// Starts to record what this thread puts on its current stream.
const char* percheron_graph_begin(Graph** out) {
  return guarded([&] {
    auto graph = std::make_unique<Graph>();
    symbol<void(void*, bool)>("_ZN2at4cuda9CUDAGraphC1Eb")(graph->self(), false);
    graph->made = true;
    using Pool = std::pair<unsigned long long, unsigned long long>;
    symbol<void(void*, Pool, int)>("_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode")(
        graph->self(), Pool{0, 0}, kThreadLocal);
    *out = graph.release();
  });
}

const char* percheron_graph_end(Graph* graph) {
  return guarded([&] { symbol<void(void*)>("_ZN2at4cuda9CUDAGraph11capture_endEv")(graph->self()); });
}

// Puts what was recorded on the current stream.
const char* percheron_graph_replay(Graph* graph) {
  return guarded([&] { symbol<void(void*)>("_ZN2at4cuda9CUDAGraph6replayEv")(graph->self()); });
}

void percheron_graph_drop(Graph* graph) { delete graph; }

}  // extern "C"
