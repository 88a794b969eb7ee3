//! Which rank this process is, as launchers say it in environment variables.

use crate::error::{Error, Result};
use std::net::Ipv6Addr;

/// This process among those that train together.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// Which one this is, from 0 on.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// Which one of those on this machine this is.
    pub local_rank: usize,
    /// How many there are on this machine.
    pub local_ranks: usize,
    /// Host and port where rank 0 waits for the others.
    pub master: String,
}

impl World {
    /// What the variables say that torchrun and Kubernetes' PyTorchJob set: `WORLD_SIZE`, `RANK`,
    /// `LOCAL_RANK` (0 if it is not set), `LOCAL_WORLD_SIZE` (1), `MASTER_ADDR`, `MASTER_PORT`.
    /// None if there is only one rank.
    ///
    /// # Errors
    /// If a variable is missing or no number in its range.
    pub fn from_env() -> Result<Option<World>> {
        World::from_variables(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<World>> {
        let number = |name: &str, [min, max]: [usize; 2]| -> Result<usize> {
            let value = variable(name).ok_or_else(|| {
                Error::invalid(format!(
                    "WORLD_SIZE is set, {name} is not: set RANK, MASTER_ADDR and MASTER_PORT too \
                    (torchrun does), or unset WORLD_SIZE to train alone"
                ))
            })?;
            value.parse().ok().filter(|n| (min..=max).contains(n)).ok_or_else(|| {
                let range = format!("a number from {min} to {max} is expected");
                Error::invalid(format!("{name} is {value:?}; {range}"))
            })
        };
        if variable("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let ranks = number("WORLD_SIZE", [1, 1 << 16])?;
        if ranks == 1 {
            return Ok(None);
        }
        let local_rank = match variable("LOCAL_RANK") {
            Some(_) => number("LOCAL_RANK", [0, ranks - 1])?,
            None => 0,
        };
        let local_ranks = match variable("LOCAL_WORLD_SIZE") {
            Some(_) => number("LOCAL_WORLD_SIZE", [1, ranks])?,
            None => 1,
        };
        let port = number("MASTER_PORT", [1, u16::MAX as usize])?;
        // torchrun's agent listens at the port itself and says so
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v == "True");
        let port = if taken && port < u16::MAX as usize { port + 1 } else { port };
        let host = variable("MASTER_ADDR").ok_or_else(|| {
            Error::invalid("WORLD_SIZE is set, MASTER_ADDR is not: set it to rank 0's host")
        })?;
        let host = if host.parse::<Ipv6Addr>().is_ok() { format!("[{host}]") } else { host };
        if host.contains('/') || !host.starts_with('[') && host.contains(':') {
            return Err(Error::invalid(format!(
                "MASTER_ADDR is {host:?}; the name or the address of rank 0's host is expected, \
                without a port"
            )));
        }
        let rank = number("RANK", [0, ranks - 1])?;
        let master = format!("{host}:{port}");
        Ok(Some(World { rank, ranks, local_rank, local_ranks, master }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string())
        })
    }

    #[test]
    fn launchers_variables_are_read() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("WORLD_SIZE", "1")]).unwrap(), None);
        let mut all = vec![
            ("WORLD_SIZE", "4"),
            ("RANK", "3"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "node-0"),
            ("MASTER_PORT", "29500"),
        ];
        let world = read(&all).unwrap().unwrap();
        let master = "node-0:29500".to_owned();
        assert_eq!(world, World { rank: 3, ranks: 4, local_rank: 1, local_ranks: 2, master });
        all.push(("TORCHELASTIC_USE_AGENT_STORE", "True"));
        assert_eq!(read(&all).unwrap().unwrap().master, "node-0:29501");
        all[4].1 = "fd00::1";
        assert_eq!(read(&all).unwrap().unwrap().master, "[fd00::1]:29501");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let error = |v: &[(&str, &str)]| read(v).unwrap_err().to_string();
        for size in ["two", "0", "-1"] {
            assert!(error(&[("WORLD_SIZE", size)]).contains("WORLD_SIZE"));
        }
        let without_rank = [("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")];
        assert!(error(&without_rank).contains("RANK is not"));
        assert!(error(&[("WORLD_SIZE", "2"), ("RANK", "0")]).contains("MASTER_PORT"));
        let mut beyond = without_rank.to_vec();
        beyond.push(("RANK", "2"));
        assert!(error(&beyond).contains("from 0 to 1"));
        for host in ["http://a", "a:29500", "127.0.0.1:1"] {
            let v =
                [("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", host), ("MASTER_PORT", "1")];
            assert!(error(&v).contains("MASTER_ADDR is"));
        }
    }
}
