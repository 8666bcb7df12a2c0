//! How much memory a process may still take, so that weights which do not fit are refused instead of having the machine kill whom it likes.

use std::path::Path;

/// Bytes that can be had now: of the machine, and of the control group that the process is in. `None` where neither can be told.
pub fn available() -> Option<u64> {
    available_under(Path::new("/"))
}

fn available_under(root: &Path) -> Option<u64> {
    let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let machine = text("proc/meminfo").and_then(|table| {
        let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
    });
    let number = |path: &str| text(path)?.trim().parse::<u64>().ok();
    // Inside a container its own group is mounted at the root. What files keep in memory can be given up.
    let group = number("sys/fs/cgroup/memory.max").zip(number("sys/fs/cgroup/memory.current")).map(|(most, now)| {
        let files = text("sys/fs/cgroup/memory.stat").and_then(|table| {
            table.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse::<u64>().ok()
        });
        most.saturating_sub(now.saturating_sub(files.unwrap_or(0)))
    });
    machine.into_iter().chain(group).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tighter_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(available_under(root.path()), None);
        write("proc/meminfo", "MemTotal:       100 kB\nMemAvailable:    40 kB\n");
        assert_eq!(available_under(root.path()), Some(40 * 1024));
        write("sys/fs/cgroup/memory.max", "max\n");
        write("sys/fs/cgroup/memory.current", "1000\n");
        assert_eq!(available_under(root.path()), Some(40 * 1024), "a group without a limit");
        write("sys/fs/cgroup/memory.max", "3000\n");
        write("sys/fs/cgroup/memory.stat", "anon 700\ninactive_file 300\n");
        assert_eq!(available_under(root.path()), Some(2300));
    }

    #[test]
    fn this_machine_tells() {
        assert!(available().is_none_or(|bytes| bytes > 1 << 20));
    }
}
