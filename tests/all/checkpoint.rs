//! A safetensors file taken apart, to be damaged and put together again. Follows the format's text, not our reader.

use std::path::Path;

use serde_json::{Map, Value, json};

/// Header and data of one file.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) header: Map<String, Value>,
    pub(crate) data: Vec<u8>,
}

impl Parts {
    pub(crate) fn read(file: &Path) -> Self {
        let bytes = fs_err::read(file).expect("the checkpoint");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let split = 8 + usize::try_from(length).expect("fits");
        Self {
            header: serde_json::from_slice(&bytes[8..split]).expect("a header"),
            data: bytes[split..].to_vec(),
        }
    }

    pub(crate) fn write(&self, file: &Path) {
        let mut header = serde_json::to_vec(&self.header).expect("JSON");
        header.resize(header.len().next_multiple_of(8), b' ');
        write_raw(file, header.len() as u64, &header, &self.data);
    }

    /// The tensor's entry in the header.
    pub(crate) fn entry(&mut self, tensor: &str) -> &mut Map<String, Value> {
        let entry = self
            .header
            .get_mut(tensor)
            .unwrap_or_else(|| panic!("no tensor {tensor}"));
        entry.as_object_mut().expect("an object")
    }

    /// Where the tensor's bytes begin and end in `data`.
    pub(crate) fn span(&mut self, tensor: &str) -> (usize, usize) {
        let at = |i: usize, entry: &Map<String, Value>| {
            usize::try_from(entry["data_offsets"][i].as_u64().expect("an offset")).expect("fits")
        };
        let entry = self.entry(tensor);
        (at(0, entry), at(1, entry))
    }

    /// Two shards and their index in `folder`, in place of `model.safetensors`.
    pub(crate) fn write_sharded(&self, folder: &Path) -> [&'static str; 2] {
        let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let tensors: Vec<&String> = self.header.keys().filter(|name| *name != "__metadata__").collect();
        let mut map = Map::new();
        for (shard, file) in tensors.chunks(tensors.len().div_ceil(2)).zip(names) {
            let mut parts = Self {
                header: Map::new(),
                data: Vec::new(),
            };
            for tensor in shard {
                let (from, to) = self.clone().span(tensor);
                let mut entry = self.header[*tensor].clone();
                entry["data_offsets"] = json!([parts.data.len(), parts.data.len() + to - from]);
                parts.data.extend_from_slice(&self.data[from..to]);
                parts.header.insert((*tensor).clone(), entry);
                map.insert((*tensor).clone(), json!(file));
            }
            parts.write(&folder.join(file));
        }
        let index = json!({ "metadata": { "total_size": self.data.len() }, "weight_map": map });
        fs_err::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("written");
        fs_err::remove_file(folder.join("model.safetensors")).expect("it was there");
        names
    }
}

/// Any bytes as a file: the length may lie.
pub(crate) fn write_raw(file: &Path, length: u64, header: &[u8], data: &[u8]) {
    fs_err::write(file, [&length.to_le_bytes(), header, data].concat()).expect("written");
}
