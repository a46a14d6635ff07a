//! The dynamic section of a 64-bit little-endian ELF file: which libraries a program names. Only what `tidy` asks.

/// Names of the shared libraries that the file needs (`DT_NEEDED`), in its order.
pub(crate) fn needed_libraries(file: &[u8]) -> Vec<String> {
    assert_eq!(&file[..6], b"\x7fELF\x02\x01", "a 64-bit little-endian ELF file");
    let segments = Segments::of(file);
    let dynamic = segments
        .0
        .iter()
        .find(|s| s.kind == DYNAMIC)
        .expect("a dynamic segment");
    let entries: Vec<(u64, u64)> = file[dynamic.offset..dynamic.offset + dynamic.bytes]
        .as_chunks::<16>()
        .0
        .iter()
        .map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
        .take_while(|(tag, _)| *tag != 0)
        .collect();
    let value = |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
    let names = segments.offset_of(value(STRING_TABLE).expect("a string table"));
    let name_at = |at: u64| {
        let bytes = &file[names + usize::try_from(at).expect("inside the file")..];
        let end = bytes.iter().position(|&b| b == 0).expect("an end of the name");
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    entries
        .iter()
        .filter(|(tag, _)| *tag == NEEDED)
        .map(|(_, at)| name_at(*at))
        .collect()
}

const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const NEEDED: u64 = 1;
const STRING_TABLE: u64 = 5;

struct Segment {
    kind: u32,
    offset: usize,
    address: u64,
    bytes: usize,
}

struct Segments(Vec<Segment>);

impl Segments {
    fn of(file: &[u8]) -> Self {
        let start = size(u64_at(file, 32));
        let (each, count) = (u16_at(file, 54), u16_at(file, 56));
        let segment = |header: &[u8]| Segment {
            kind: u32::from_le_bytes(header[..4].try_into().expect("4 bytes")),
            offset: size(u64_at(header, 8)),
            address: u64_at(header, 16),
            bytes: size(u64_at(header, 32)),
        };
        Self(file[start..start + each * count].chunks(each).map(segment).collect())
    }

    fn offset_of(&self, address: u64) -> usize {
        let holds = |s: &&Segment| s.kind == LOAD && address >= s.address && address - s.address < s.bytes as u64;
        let segment = self.0.iter().find(holds).expect("the address is loaded from the file");
        segment.offset + size(address - segment.address)
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes")))
}

fn size(number: u64) -> usize {
    usize::try_from(number).expect("fits the machine")
}
