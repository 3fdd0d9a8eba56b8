//! What the workers of a run compute on and by.

use tokio::process::Command;

/// The same for all workers, but the devices, which they take in turn.
#[derive(Debug, Clone)]
pub(crate) struct Means {
    /// Threads inside an operation of a worker.
    pub(crate) threads: u32,
    /// As `percheron-worker --device` takes them. Worker `n` has number `n` modulo how many there are.
    pub(crate) devices: Vec<String>,
    /// As `percheron-worker --transport` takes it.
    pub(crate) transport: Option<String>,
}

impl Means {
    /// Adds what they mean for worker `number`.
    pub(crate) fn apply(&self, number: u32, command: &mut Command) {
        command.args(["--threads", &self.threads.to_string()]);
        if let Some(transport) = &self.transport {
            command.args(["--transport", transport]);
        }
        apply_device(&self.devices, number, command);
        let only =
            self.devices.len() == 1 && self.devices.iter().any(|device| device.contains(':'));
        if only || is_shared(&self.devices, number) {
            // The workers of one `up` share a host, so all traffic may take its loopback interface.
            command.env("NCCL_HOSTID", host_id(number)).env("NCCL_SOCKET_IFNAME", "lo");
        }
    }
}

/// Gives worker `number` of this machine its device, of which they take theirs in turn.
pub(crate) fn apply_device(devices: &[String], number: u32, command: &mut Command) {
    let Some(device) = devices.get(number as usize % devices.len().max(1)) else { return };
    command.args(["--device", device]);
    if is_shared(devices, number) {
        // NCCL takes two ranks on one GPU for a mistake, unless they seem to be on two hosts.
        command.env("NCCL_HOSTID", host_id(number));
    }
}

fn is_shared(devices: &[String], number: u32) -> bool {
    let device = devices.get(number as usize % devices.len().max(1));
    devices.iter().filter(|&other| Some(other) == device).count() > 1
}

fn host_id(number: u32) -> String {
    format!("percheron-worker-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(number: u32, devices: &[&str]) -> (Vec<String>, bool) {
        let devices = devices.iter().map(|&device| device.to_owned()).collect();
        let mut command = Command::new("worker");
        Means { threads: 2, devices, transport: None }.apply(number, &mut command);
        let command = command.as_std();
        let arguments = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        (arguments, command.get_envs().any(|(name, _)| name == "NCCL_HOSTID"))
    }

    #[test]
    fn workers_take_the_devices_in_turn() {
        assert_eq!(of(0, &[]).0, ["--threads", "2"]);
        assert_eq!(of(5, &["cuda:0", "cuda:1"]).0, ["--threads", "2", "--device", "cuda:1"]);
        assert!(!of(5, &["cuda:0", "cuda:1"]).1, "each GPU has one worker");
        assert!(of(1, &["cuda:0", "cuda:0"]).1, "two workers share a GPU");
    }
}
