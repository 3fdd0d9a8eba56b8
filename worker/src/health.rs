//! How a GPU is, as its driver says: what it does, how warm it is, and what has broken in it.
//!
//! The driver is asked through NVML, which is loaded at run time, in a thread of its own. An error that the
//! driver calls an Xid is counted; one that means broken hardware is said once, so that the run goes on elsewhere.
//!
//! Source: NVIDIA, *XID Errors* (GPU Deployment and Management), and the NVML API reference.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::{device::ThrottleReasons, event::EventTypes},
    enum_wrappers::{
        device::{EccCounter, MemoryError, TemperatureSensor},
        nv_link::ErrorCounter,
    },
    enums::event::XidError,
    error::{NvmlError, NvmlErrorWithSource},
    event::EventSet,
};
use proto::v1::DeviceHealth;
use tracing::warn;

/// How often the driver is asked. Its own samples are between 1/6 s and 1 s long.
pub const PERIOD: Duration = Duration::from_secs(1);

/// NVLinks that a device may have, of the largest there are.
const LINKS_MAX: u32 = 18;

/// What is said of an Xid that the driver has no number for.
const UNKNOWN_XID: u64 = 999;

/// Why training is slower than it could be. Being idle or set to other clocks is no fault.
const THROTTLED: [(ThrottleReasons, &str); 6] = [
    (ThrottleReasons::SW_POWER_CAP, "power_cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hardware_slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync_boost"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "thermal"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hardware_thermal"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power_brake"),
];

/// A driver that cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// NVML cannot be loaded or does not answer.
    #[error("the GPU's driver cannot be asked how it is (libnvidia-ml.so.1)")]
    Driver(#[source] NvmlError),
    /// The driver does not know the device.
    #[error("the driver does not know the GPU at PCI address {bus_id}")]
    Device {
        /// `DOMAIN:BUS:DEVICE.FUNCTION`, hexadecimal.
        bus_id: String,
        /// What it said.
        #[source]
        source: NvmlError,
    },
    /// The system refused a thread.
    #[error("no thread can be started to watch the GPU")]
    Thread(#[source] std::io::Error),
}

/// A GPU that is watched until this is dropped.
#[derive(Debug)]
pub struct Watch {
    latest: Arc<Mutex<DeviceHealth>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the GPU at a PCI address, `DOMAIN:BUS:DEVICE.FUNCTION` in hexadecimal digits, and asks every
    /// `period`. `broken` is called, once, when its hardware turns out to be broken. `library` is the driver's
    /// if not the usual one.
    ///
    /// # Errors
    /// [`HealthError`].
    pub fn start(
        library: Option<&Path>,
        bus_id: &str,
        period: Duration,
        broken: impl FnOnce(String) + Send + 'static,
    ) -> Result<Self, HealthError> {
        let library = library.map(Path::to_owned);
        let nvml = open(library.as_ref()).map_err(HealthError::Driver)?;
        let latest = Arc::new(Mutex::new(first_sample(&nvml, bus_id)?));
        let end = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            bus_id: bus_id.to_owned(),
            period,
            latest: Arc::clone(&latest),
            end: Arc::clone(&end),
            broken: Some(broken),
            told: None,
        };
        let thread = std::thread::Builder::new()
            .name("health".to_owned())
            .spawn(move || watcher.run(&nvml))
            .map_err(HealthError::Thread)?;
        Ok(Self { latest, end, thread: Some(thread) })
    }

    /// What the driver said last.
    #[must_use]
    pub fn latest(&self) -> DeviceHealth {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // Not waited for: a driver that hangs must not keep the process.
        drop(self.thread.take());
    }
}

fn open(library: Option<&PathBuf>) -> Result<Nvml, NvmlError> {
    match library {
        Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
        // The wrapper's own name is that of the file for developers, which few machines have.
        None => Nvml::builder().lib_path("libnvidia-ml.so.1".as_ref()).init(),
    }
}

fn first_sample(nvml: &Nvml, bus_id: &str) -> Result<DeviceHealth, HealthError> {
    let unknown = |source| HealthError::Device { bus_id: bus_id.to_owned(), source };
    let device = nvml.device_by_pci_bus_id(bus_id).map_err(unknown)?;
    sample(&device).map_err(unknown)
}

struct Watcher<F> {
    bus_id: String,
    period: Duration,
    latest: Arc<Mutex<DeviceHealth>>,
    end: Arc<AtomicBool>,
    broken: Option<F>,
    /// What the driver failed with last, so that it is told once.
    told: Option<String>,
}

impl<F: FnOnce(String)> Watcher<F> {
    fn run(mut self, nvml: &Nvml) {
        let device = match nvml.device_by_pci_bus_id(self.bus_id.as_str()) {
            Ok(device) => device,
            Err(error) => return self.failed(&error),
        };
        let events = match errors_of(nvml, &device) {
            Ok(events) => Some(events),
            Err(error) => {
                warn!(%error, "the GPU's driver does not tell of errors; the rest is watched");
                None
            }
        };
        while !self.end.load(Ordering::Relaxed) {
            let until = Instant::now() + self.period;
            match events.as_ref().map(|events| events.wait(millis(self.period))) {
                None => std::thread::park_timeout(self.period),
                Some(Ok(event)) => {
                    if let Some(xid) = event.event_data {
                        self.count(&xid);
                    }
                }
                Some(Err(NvmlError::Timeout)) => {}
                Some(Err(error)) => {
                    self.failed(&error);
                    std::thread::park_timeout(until.saturating_duration_since(Instant::now()));
                }
            }
            match sample(&device) {
                Ok(found) => {
                    let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
                    let xids = std::mem::take(&mut latest.xids);
                    *latest = DeviceHealth { xids, ..found };
                }
                Err(error) => self.failed(&error),
            }
        }
    }

    fn count(&mut self, xid: &XidError) {
        let number = match xid {
            XidError::Value(number) => *number,
            XidError::Unknown => UNKNOWN_XID,
        };
        let known = u32::try_from(number).unwrap_or(u32::MAX);
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest.xids.entry(known).or_default() += 1;
        drop(latest);
        match meaning(number) {
            Some(meaning) => self.say(format!("the GPU has Xid {number}, {meaning}")),
            None => warn!(xid = number, "the GPU's driver reports an error of a program"),
        }
    }

    fn failed(&mut self, error: &NvmlError) {
        if matches!(error, NvmlError::GpuLost) {
            self.say("the driver has lost the GPU".to_owned());
        } else if self.told.replace(error.to_string()) != Some(error.to_string()) {
            warn!(%error, "the GPU's driver does not say how it is");
        }
    }

    fn say(&mut self, what: String) {
        if let Some(broken) = self.broken.take() {
            broken(what);
        }
    }
}

fn errors_of<'a>(nvml: &'a Nvml, device: &Device<'a>) -> Result<EventSet<'a>, NvmlError> {
    let events = nvml.create_event_set()?;
    device
        .register_events(EventTypes::CRITICAL_XID_ERROR, events)
        .map_err(|NvmlErrorWithSource { error, .. }| error)
}

fn millis(period: Duration) -> u32 {
    u32::try_from(period.as_millis()).unwrap_or(u32::MAX)
}

/// What an Xid says of the hardware. Of the others most come from what a program did, and a machine that shows
/// them is no worse than before.
fn meaning(xid: u64) -> Option<&'static str> {
    Some(match xid {
        48 => "an ECC error of two bits",
        62 => "a controller that has halted",
        64 => "memory that cannot be remapped",
        74 => "an error of NVLink",
        79 => "which has fallen off the bus",
        92 => "too many ECC errors",
        95 => "an ECC error that is not contained",
        119 | 120 => "whose own processor does not answer",
        140 => "an ECC error that is not recovered",
        143 => "which cannot be started",
        _ => return None,
    })
}

/// Asks for everything; what a device does not have is left out.
fn sample(device: &Device<'_>) -> Result<DeviceHealth, NvmlError> {
    let memory = device.memory_info()?;
    let utilization = known(device.utilization_rates())?.map_or(0, |rates| rates.gpu);
    let throttled = known(device.current_throttle_reasons())?.unwrap_or(ThrottleReasons::empty());
    let held = THROTTLED.iter().filter(|(reason, _)| throttled.contains(*reason));
    let ecc = |kind| known(device.total_ecc_errors(kind, EccCounter::Volatile));
    let (nvlinks_active, nvlink_errors) = links(device)?;
    Ok(DeviceHealth {
        name: device.name()?,
        utilization: f64::from(utilization) / 100.0,
        memory_used_bytes: memory.used,
        memory_total_bytes: memory.total,
        temperature_celsius: known(device.temperature(TemperatureSensor::Gpu))?,
        power_watts: known(device.power_usage())?.map(|milliwatts| f64::from(milliwatts) / 1e3),
        ecc_corrected: ecc(MemoryError::Corrected)?,
        ecc_uncorrected: ecc(MemoryError::Uncorrected)?,
        nvlinks_active,
        nvlink_errors,
        throttled_by: held.map(|(_, name)| (*name).to_owned()).collect(),
        xids: std::collections::HashMap::new(),
    })
}

/// How many NVLinks are up, and the errors on all of them.
fn links(device: &Device<'_>) -> Result<(u32, u64), NvmlError> {
    let (mut active, mut errors) = (0, 0);
    for number in 0..LINKS_MAX {
        let link = device.link_wrapper_for(number);
        match known(link.is_active())? {
            Some(true) => active += 1,
            Some(false) => continue,
            None => break, // It has no more of them.
        }
        let counters = [
            ErrorCounter::DlReplay,
            ErrorCounter::DlRecovery,
            ErrorCounter::DlCrcFlit,
            ErrorCounter::DlCrcData,
        ];
        for counter in counters {
            errors += known(link.error_counter(counter))?.unwrap_or(0);
        }
    }
    Ok((active, errors))
}

/// Nothing, where a device or a driver does not have what was asked for.
fn known<T>(asked: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(
            NvmlError::NotSupported
            | NvmlError::InvalidArg
            | NvmlError::NoPermission
            | NvmlError::FunctionNotFound
            | NvmlError::FailedToLoadSymbol(_),
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_did_is_no_fault_of_the_machine() {
        for xid in [13, 31, 43, 45, 63, 94] {
            assert_eq!(meaning(xid), None, "{xid}");
        }
        assert_eq!(meaning(79), Some("which has fallen off the bus"));
    }

    #[test]
    fn a_missing_driver_is_one_clear_error() {
        let library = Path::new("/nowhere/libnvidia-ml.so");
        let error = Watch::start(Some(library), "0000:01:00.0", PERIOD, drop).unwrap_err();
        assert!(error.to_string().contains("libnvidia-ml.so.1"), "{error}");
    }
}
