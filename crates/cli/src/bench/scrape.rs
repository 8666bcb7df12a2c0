//! What a process tells at `/metrics`.

use std::io;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Samples by name and labels, as Prometheus writes them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scrape(Vec<(String, f64)>);

/// Asks an admin port.
///
/// # Errors
/// If it does not answer.
pub(crate) async fn fetch(address: &str) -> io::Result<Scrape> {
    let mut stream = TcpStream::connect(address).await?;
    // Version 1.0: the answer ends with the connection.
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(Scrape::parse(&answer))
}

impl Scrape {
    fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(samples.collect())
    }

    /// The sum of all samples of a name whose labels hold this text.
    pub(crate) fn sum(&self, name: &str, label: &str) -> f64 {
        self.named(name, label).map(|(_, value)| value).sum()
    }

    fn named<'a>(&'a self, name: &'a str, label: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.iter().filter_map(move |(full, value)| {
            let labels = full.strip_prefix(name)?;
            let same = labels.is_empty() || labels.starts_with('{');
            (same && labels.contains(label)).then_some((labels, *value))
        })
    }

    /// A histogram.
    pub(crate) fn histogram(&self, name: &str, label: &str) -> Histogram {
        let bucket = format!("{name}_bucket");
        let bound = |labels: &str| labels.split("le=\"").nth(1)?.split('"').next()?.parse::<f64>().ok();
        let buckets = self.named(&bucket, label).filter_map(|(labels, count)| Some((bound(labels)?, count)));
        Histogram {
            buckets: buckets.collect(),
            count: self.sum(&format!("{name}_count"), label),
            sum: self.sum(&format!("{name}_sum"), label),
        }
    }
}

/// Counts up to bounds, as Prometheus has them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Histogram {
    /// (bound, how many are not above it), bounds rising.
    buckets: Vec<(f64, f64)>,
    pub(crate) count: f64,
    pub(crate) sum: f64,
}

impl Histogram {
    /// Adds what came to another one between two points in time.
    pub(crate) fn add_difference(&mut self, before: &Self, after: &Self) {
        if self.buckets.is_empty() {
            self.buckets = after.buckets.iter().map(|(bound, _)| (*bound, 0.0)).collect();
        }
        for (index, bucket) in self.buckets.iter_mut().enumerate() {
            let at = |histogram: &Self| histogram.buckets.get(index).map_or(0.0, |(_, count)| *count);
            bucket.1 += at(after) - at(before);
        }
        self.count += after.count - before.count;
        self.sum += after.sum - before.sum;
    }

    /// The mean; 0 of nothing.
    pub(crate) fn mean(&self) -> f64 {
        if self.count > 0.0 { self.sum / self.count } else { 0.0 }
    }

    /// About the value that this share of all is not above: on a straight line through its bucket.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let wanted = share * self.count;
        let (mut low, mut below) = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if count >= wanted && count > below {
                let bound = if bound.is_finite() { bound } else { low };
                return low + (bound - low) * (wanted - below) / (count - below);
            }
            (low, below) = (bound, count);
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "HTTP/1.0 200 OK\r\n\r\n# TYPE wait histogram\nwait_bucket{queue=\"a\",le=\"1\"} 2\n\
        wait_bucket{queue=\"a\",le=\"2\"} 4\nwait_bucket{queue=\"a\",le=\"+Inf\"} 4\nwait_sum{queue=\"a\"} 5\n\
        wait_count{queue=\"a\"} 4\nwait_sum{queue=\"b\"} 7\nwait_sum_other 9\nplain 3\n";

    #[test]
    fn samples_are_found_by_name_and_label() {
        let scrape = Scrape::parse(TEXT);
        assert_eq!((scrape.sum("wait_sum", ""), scrape.sum("wait_sum", "queue=\"b\"")), (12.0, 7.0));
        assert_eq!((scrape.sum("plain", ""), scrape.sum("absent", "")), (3.0, 0.0));
    }

    #[test]
    fn a_histogram_has_a_mean_and_quantiles() {
        let after = Scrape::parse(TEXT).histogram("wait", "queue=\"a\"");
        let mut sum = Histogram::default();
        sum.add_difference(&Histogram::default(), &after);
        assert_eq!((sum.mean(), sum.quantile(0.5), sum.quantile(0.75)), (1.25, 1.0, 1.5));
        sum.add_difference(&after, &after);
        assert_eq!((sum.count, sum.quantile(1.0)), (4.0, 2.0));
        assert_eq!((Histogram::default().mean(), Histogram::default().quantile(0.5)), (0.0, 0.0));
    }
}
