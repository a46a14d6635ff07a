//! HELP's public latency tables of NAS-Bench-201: 15,625 cells on 27 devices (converted to CSV, see its README beside the
//! data). Reads and checks; what the times are good for is `cotk_latency::transfer`'s. Optional: absent data is said.

use std::io::Read;
use std::path::{Path, PathBuf};

use cotk_run::files;

use crate::{DataError, Result, locate};

/// The archive needs 65 MiB to unpack.
const XZ_MEMORY_BYTES: u64 = 256 << 20;
/// More than four times the published table.
const LIMIT_BYTES: u64 = 1 << 24;

const HELP: &str = "put nasbench201.csv.xz and devices.csv (HELP's tables, github.com/HayeonLee/HELP, as CSV) into data/help, \
                    or set COTK_DATA to the folder that holds help/";

/// Measured times of every cell on every device.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// Operation of each edge, 0 to 4, in the order 0→1, 0→2, 1→2, 0→3, 1→3, 2→3.
    pub cells: Vec<[u8; 6]>,
    /// Multiply-adds of the whole network.
    pub macs: Vec<f64>,
    /// In the order of the file's columns.
    pub devices: Vec<Device>,
}

/// One column.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// `titan_rtx_256`: after the underscore of a GPU stands its batch size.
    pub name: String,
    /// `desktop GPU`, `server CPU`, `phone`, …
    pub kind: String,
    /// `meta-train`, `meta-valid`, `meta-test` or `unused` in the paper.
    pub role: String,
    /// By cell. Some are no latencies (0.01 ms): the tables are kept as published.
    pub ms: Vec<f64>,
}

impl Tables {
    /// Of one device.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }
}

/// The folder `help`, where data is looked for.
///
/// # Errors
/// [`DataError::Missing`] with the places that were looked at.
pub fn folder() -> Result<PathBuf> {
    locate("help", HELP)
}

/// Reads `nasbench201.csv.xz` and `devices.csv`.
///
/// # Errors
/// [`DataError::Missing`], [`DataError::Xz`]; [`DataError::Cell`] names file, line and column.
pub fn nasbench201(folder: &Path) -> Result<Tables> {
    let (times, roles) = (folder.join("nasbench201.csv.xz"), folder.join("devices.csv"));
    for file in [&times, &roles] {
        if !file.is_file() {
            let looked = vec![file.clone()];
            return Err(DataError::Missing {
                what: "HELP's tables".into(),
                looked,
                help: HELP.into(),
            });
        }
    }
    let text = unpack(&times)?;
    parse(&times, &text, &roles, &files::read_text(&roles, LIMIT_BYTES)?)
}

fn unpack(path: &Path) -> Result<String> {
    let xz = |detail: String| DataError::Xz {
        file: path.to_owned(),
        detail,
    };
    let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_BYTES, 0).map_err(|e| xz(e.to_string()))?;
    let mut text = String::new();
    liblzma::read::XzDecoder::new_stream(files::open(path)?, stream)
        .take(LIMIT_BYTES)
        .read_to_string(&mut text)
        .map_err(|e| xz(e.to_string()))?;
    Ok(text)
}

fn parse(times: &Path, text: &str, roles: &Path, roles_text: &str) -> Result<Tables> {
    let wrong = |file: &Path, line: usize, column: &str, found: &str, expected: &str| DataError::Cell {
        file: file.to_owned(),
        line: line + 1,
        column: column.to_owned(),
        found: found.to_owned(),
        expected: expected.to_owned(),
    };
    let mut lines = text.lines().enumerate();
    let head: Vec<&str> = lines.next().map_or(Vec::new(), |(_, line)| line.split(',').collect());
    if head.len() < 4 || head[..3] != ["index", "ops", "macs"] {
        return Err(wrong(times, 0, "head", &head.join(","), "index,ops,macs, then devices"));
    }
    let mut devices = head[3..]
        .iter()
        .map(|name| device(name, roles_text))
        .collect::<Option<Vec<_>>>();
    let devices = devices.as_mut().ok_or_else(|| {
        let unknown = head[3..].iter().find(|name| device(name, roles_text).is_none());
        wrong(
            roles,
            0,
            "column",
            "nothing",
            &format!("a row for {}", unknown.unwrap_or(&"?")),
        )
    })?;
    let (mut cells, mut macs) = (Vec::new(), Vec::new());
    for (line, row) in lines {
        let fields: Vec<&str> = row.split(',').collect();
        if fields.len() != head.len() {
            let expected = format!("{} fields", head.len());
            return Err(wrong(
                times,
                line,
                "all",
                &format!("{} fields", fields.len()),
                &expected,
            ));
        }
        if fields[0] != cells.len().to_string() {
            return Err(wrong(times, line, "index", fields[0], &cells.len().to_string()));
        }
        let ops: Option<Vec<u8>> = fields[1]
            .bytes()
            .map(|b| (b'0'..=b'4').contains(&b).then(|| b - b'0'))
            .collect();
        let ops = ops.and_then(|ops| <[u8; 6]>::try_from(ops).ok());
        cells.push(ops.ok_or_else(|| wrong(times, line, "ops", fields[1], "six digits from 0 to 4"))?);
        let number = |column: usize| -> Result<f64> {
            let value: Option<f64> = fields[column].parse().ok();
            let value = value.filter(|v| v.is_finite() && *v > 0.0);
            value.ok_or_else(|| wrong(times, line, head[column], fields[column], "a number above 0"))
        };
        macs.push(number(2)?);
        for (column, device) in devices.iter_mut().enumerate() {
            device.ms.push(number(3 + column)?);
        }
    }
    Ok(Tables {
        cells,
        macs,
        devices: std::mem::take(devices),
    })
}

/// `column,hardware,kind,batch,role_nb201,…`
fn device(name: &str, roles: &str) -> Option<Device> {
    let row: Vec<&str> = roles
        .lines()
        .map(|l| l.split(',').collect::<Vec<_>>())
        .find(|row| row[0] == name)?;
    let (kind, role) = (row.get(2)?, row.get(4)?);
    Some(Device {
        name: name.to_owned(),
        kind: (*kind).to_owned(),
        role: (*role).to_owned(),
        ms: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const ROLES: &str = "column,hardware,kind,batch,role_nb201\na_1,A,phone,1,meta-train\nb,B,FPGA,-,meta-test\n";
    const TIMES: &str = "index,ops,macs,b,a_1\n0,012340,7000,1.5,2\n1,333333,9000,0.01,3\n";

    fn write(times: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = liblzma::write::XzEncoder::new(Vec::new(), 1);
        writer.write_all(times.as_bytes()).unwrap();
        files::write_atomic(dir.path().join("nasbench201.csv.xz"), &writer.finish().unwrap()).unwrap();
        files::write_atomic(dir.path().join("devices.csv"), ROLES.as_bytes()).unwrap();
        dir
    }

    #[test]
    fn columns_are_read_by_name_and_zeros_count() {
        let dir = write(TIMES);
        let tables = nasbench201(dir.path()).unwrap();
        assert_eq!(tables.cells, [[0, 1, 2, 3, 4, 0], [3; 6]]);
        assert_eq!(tables.macs, [7000.0, 9000.0]);
        assert_eq!(tables.device("a_1").unwrap().ms, [2.0, 3.0]);
        let b = tables.device("b").unwrap();
        assert_eq!(
            (b.kind.as_str(), b.role.as_str(), b.ms.as_slice()),
            ("FPGA", "meta-test", &[1.5, 0.01][..])
        );
        assert!(tables.device("c").is_none());
    }

    #[test]
    fn what_cannot_be_right_is_named() {
        let refuse = |from: &str, to: &str, says: &[&str]| {
            let dir = write(&TIMES.replace(from, to));
            let text = nasbench201(dir.path()).unwrap_err().to_string();
            assert!(says.iter().all(|s| text.contains(s)), "{text}");
        };
        refuse("333333", "333335", &["nasbench201.csv.xz", "line 3", "ops", "333335"]);
        refuse("333333", "33333", &["line 3", "six digits"]);
        refuse("0.01", "-1", &["line 3", "`b`", "found -1"]);
        refuse("0.01", "nan", &["above 0"]);
        refuse(",3\n", "\n", &["4 fields", "5 fields"]);
        refuse("1,333", "2,333", &["index", "found 2", "expected 1"]);
        refuse("a_1", "a_9", &["devices.csv", "a_9"]);
        refuse("index,", "x,", &["line 1"]);
        let dir = write(TIMES);
        files::write_atomic(dir.path().join("nasbench201.csv.xz"), b"no archive").unwrap();
        assert!(matches!(nasbench201(dir.path()), Err(DataError::Xz { .. })));
        fs_err::remove_file(dir.path().join("devices.csv")).unwrap();
        assert!(matches!(nasbench201(dir.path()), Err(DataError::Missing { .. })));
    }
}
