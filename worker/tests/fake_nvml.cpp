// A library that answers as NVML does, for one device per PCI address. The address says what the device is like:
// in DOMAIN:BUS:DEVICE.FUNCTION the bus is the Xid that it reports once (0: none), device 1f is lost after the
// first sample, and domain ffff is not there.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>

namespace {
constexpr int kOk = 0, kInvalid = 2, kUnsupported = 3, kNotFound = 6, kTimeout = 10, kLost = 15;

struct Device {
  unsigned xid = 0;
  bool fades = false;
  std::atomic<int> samples{0};
  std::atomic<bool> told{false};
};
Device devices[256];

struct Memory {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct Event {
  void* device;
  unsigned long long type, data;
  unsigned gpu, compute;
};
struct Rates {
  unsigned gpu, memory;
};
Device* watched = nullptr;
}  // namespace

extern "C" {
int nvmlInit_v2() { return kOk; }
int nvmlShutdown() { return kOk; }
const char* nvmlErrorString(int) { return "fake"; }

int nvmlDeviceGetHandleByPciBusId_v2(const char* address, Device** out) {
  unsigned domain, bus, number, function;
  if (std::sscanf(address, "%x:%x:%x.%x", &domain, &bus, &number, &function) != 4) return kInvalid;
  if (domain == 0xffff || bus > 0xff) return kNotFound;
  devices[bus].xid = bus;
  devices[bus].fades = number == 0x1f;
  *out = &devices[bus];
  return kOk;
}

int nvmlDeviceGetName(Device*, char* name, unsigned length) {
  std::snprintf(name, length, "Fake GPU");
  return kOk;
}

int nvmlDeviceGetMemoryInfo_v2(Device* device, Memory* out) {
  if (device->fades && device->samples++ > 0) return kLost;
  out->total = 1000;
  out->used = 250;
  return kOk;
}

int nvmlDeviceGetUtilizationRates(Device*, Rates* out) {
  out->gpu = 87;
  return kOk;
}

int nvmlDeviceGetTemperature(Device*, int, unsigned* out) {
  *out = 61;
  return kOk;
}

int nvmlDeviceGetPowerUsage(Device*, unsigned* out) {
  *out = 412500;
  return kOk;
}

// Counts that this device does not keep.
int nvmlDeviceGetTotalEccErrors(Device* device, int kind, int, unsigned long long* out) {
  if (device->xid == 0 && kind == 1) return kUnsupported;
  *out = kind == 0 ? 5 : 1;
  return kOk;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device*, unsigned long long* out) {
  *out = 0x1 | 0x4 | 0x40;  // Idle, power cap, hardware thermal.
  return kOk;
}

int nvmlDeviceGetNvLinkState(Device*, unsigned link, int* out) {
  if (link >= 3) return kInvalid;
  *out = link != 1;
  return kOk;
}

int nvmlDeviceGetNvLinkErrorCounter(Device*, unsigned, int counter, unsigned long long* out) {
  *out = counter == 0 ? 2 : 0;
  return kOk;
}

int nvmlEventSetCreate(void** out) {
  *out = &watched;
  return kOk;
}
int nvmlEventSetFree(void*) { return kOk; }
int nvmlDeviceRegisterEvents(Device* device, unsigned long long types, void*) {
  if (types != 0x8) return kInvalid;
  watched = device;
  return kOk;
}

int nvmlEventSetWait_v2(void*, Event* out, unsigned milliseconds) {
  if (watched->xid != 0 && !watched->told.exchange(true)) {
    *out = {watched, 0x8, watched->xid, 0, 0};
    return kOk;
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return kTimeout;
}
}
