//! The compiled kernels that this program carries.

/// One file of kernels, compiled for one architecture.
pub struct Image {
    /// Name of the file of kernels.
    pub name: &'static str,
    /// `sm_90a` for machine code, `compute_90` for PTX, which later GPUs translate.
    pub arch: &'static str,
    /// The compiled code, as the driver loads it.
    pub bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// How well an architecture's images serve a GPU of compute capability `(major, minor)`; the
/// highest is the best.
fn fitness(arch: &str, (major, minor): (u32, u32)) -> Option<(u32, u32, u32)> {
    let (kind, number) = arch.split_once('_')?;
    let digits = number.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number_of: u32 = digits.parse().ok()?;
    let (own_major, own_minor) = (number_of / 10, number_of % 10);
    let fits = if kind == "compute" {
        (own_major, own_minor) <= (major, minor)
    } else if digits != number {
        // an architecture's own instructions run there and nowhere else
        (own_major, own_minor) == (major, minor)
    } else {
        own_major == major && own_minor <= minor
    };
    let specific = (kind == "sm") as u32 * 2 + (digits != number) as u32;
    fits.then_some((specific, own_major, own_minor))
}

/// The best images for a GPU, one for each file of kernels.
pub fn for_gpu(capability: (u32, u32)) -> Option<Vec<&'static Image>> {
    let arch = IMAGES.iter().filter_map(|i| Some((fitness(i.arch, capability)?, i.arch))).max()?.1;
    Some(IMAGES.iter().filter(|i| i.arch == arch).collect())
}

/// Architectures that the kernels were compiled for.
pub fn architectures() -> Vec<&'static str> {
    let mut archs: Vec<&str> = IMAGES.iter().map(|i| i.arch).collect();
    archs.sort_unstable();
    archs.dedup();
    archs
}

#[cfg(test)]
mod tests {
    use super::fitness;

    #[test]
    fn gpus_get_the_most_specific_images_that_run_there() {
        let best = |capability| {
            let archs = ["sm_80", "sm_90a", "compute_90"];
            archs.into_iter().filter_map(|a| Some((fitness(a, capability)?, a))).max().map(|b| b.1)
        };
        assert_eq!(best((9, 0)), Some("sm_90a"));
        assert_eq!(best((8, 0)), Some("sm_80"));
        assert_eq!(best((8, 9)), Some("sm_80"));
        assert_eq!(best((10, 0)), Some("compute_90"));
        assert_eq!(best((12, 1)), Some("compute_90"));
        assert_eq!(best((7, 5)), None);
    }
}
