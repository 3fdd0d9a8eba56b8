//! Which device a worker computes on, as people write it.

use tch::Device;

/// Reads `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// What else it is, and what to write.
pub fn parse(text: &str) -> Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", number)) => number
            .parse()
            .map(Device::Cuda)
            .map_err(|_| format!("{number:?} is not the number of a GPU: write cuda:0")),
        None | Some(_) => Err("a device is cpu, cuda or cuda:N".to_owned()),
    }
}

/// The name that [`parse`] reads.
#[must_use]
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(number) => format!("cuda:{number}"),
        Device::Cpu => "cpu".to_owned(),
        Device::Mps => "mps".to_owned(),
        Device::Vulkan => "vulkan".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_named() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(7)] {
            assert_eq!(parse(&name(device)), Ok(device));
        }
        assert_eq!(parse("cuda"), Ok(Device::Cuda(0)));
        assert!(parse("cuda:x").unwrap_err().contains("cuda:0"));
        assert!(parse("gpu").is_err());
    }
}
