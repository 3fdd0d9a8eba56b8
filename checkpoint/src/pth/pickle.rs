//! A pickle reader that runs nothing: it builds plain values, and refuses every callable that is not on
//! its short list.
//!
//! Format: the Python documentation of `pickletools`, protocols 2 to 5, as `torch.save` writes them.

use super::PthFault;

/// Values that one file may hold: an archive of a large network has some ten thousand.
const NODES_MAX: usize = 4 << 20;

/// The place of a node in its pickle.
pub(super) type Id = usize;

/// A plain value. Containers hold places, since a pickle may hold one object twice.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// Something of a module, by name; it is only named.
    Global(String),
    /// A storage of the archive.
    Storage {
        /// Its class, such as `torch FloatStorage`.
        class: String,
        /// Its object in the archive.
        key: String,
    },
    Tensor(TensorNode),
    /// An object whose attributes are kept as a dictionary.
    Object(Option<Id>),
}

/// A view of a storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorNode {
    pub(super) class: String,
    pub(super) key: String,
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// All values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    pub(super) nodes: Vec<Node>,
    pub(super) root: Id,
}

/// Reads a pickle.
pub(super) fn read(bytes: &[u8]) -> Result<Pickle, PthFault> {
    let mut machine = Machine { bytes, at: 0, ..Machine::default() };
    loop {
        let opcode = machine.byte()?;
        if opcode == b'.' {
            let root = machine.pop()?;
            return Ok(Pickle { nodes: machine.nodes, root });
        }
        machine.step(opcode)?;
    }
}

#[derive(Debug, Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: std::collections::BTreeMap<u64, Id>,
}

impl Machine<'_> {
    fn step(&mut self, opcode: u8) -> Result<(), PthFault> {
        match opcode {
            0x80 => drop(self.byte()?),  // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'2' => {
                let top = *self.stack.last().ok_or_else(|| self.broken("an empty stack"))?;
                self.stack.push(top);
            }
            b'q' | b'h' | b'r' | b'j' | 0x94 => self.memorize(opcode)?,
            b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | b'G' => self.number(opcode)?,
            b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' => self.text(opcode)?,
            b'}' | b']' | b')' | b'd' | b'l' | b't' | 0x85..=0x87 => self.container(opcode)?,
            b'a' | b'e' | b's' | b'u' => self.fill(opcode)?,
            b'c' | 0x93 | b'Q' | b'R' | 0x81 | b'b' => self.construct(opcode)?,
            unknown => {
                return Err(
                    self.broken(&format!("opcode {unknown:#04x}, which is not used by torch.save"))
                );
            }
        }
        Ok(())
    }

    fn memorize(&mut self, opcode: u8) -> Result<(), PthFault> {
        let place = match opcode {
            b'q' | b'h' => u64::from(self.byte()?),
            b'r' | b'j' => self.unsigned(4)?,
            _ => self.memo.len() as u64, // MEMOIZE
        };
        if matches!(opcode, b'h' | b'j') {
            let held = self.memo.get(&place).copied();
            let held = held.ok_or_else(|| self.broken("a memo that was never written"))?;
            self.stack.push(held);
        } else {
            let top = *self.stack.last().ok_or_else(|| self.broken("an empty stack"))?;
            self.memo.insert(place, top);
        }
        Ok(())
    }

    fn number(&mut self, opcode: u8) -> Result<(), PthFault> {
        let node = match opcode {
            b'N' => Node::None,
            0x88 => Node::Bool(true),
            0x89 => Node::Bool(false),
            b'J' => {
                let bytes = self.array::<4>()?;
                Node::Int(i32::from_le_bytes(bytes).into())
            }
            b'K' => Node::Int(self.byte()?.into()),
            b'M' => Node::Int(u16::from_le_bytes(self.array()?).into()),
            b'G' => Node::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let length = self.byte()?.into(); // LONG1
                let bytes = self.take(length)?;
                if bytes.len() > 8 {
                    return Err(self.broken("an integer of more than 64 bits"));
                }
                let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                Node::Int(i64::from_le_bytes(wide))
            }
        };
        self.push(node)
    }

    fn text(&mut self, opcode: u8) -> Result<(), PthFault> {
        let width = match opcode {
            0x8c | b'U' | b'C' => 1,
            0x8d => 8,
            _ => 4,
        };
        let length = self.unsigned(width)?;
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = self.take(length)?.to_vec();
        if matches!(opcode, b'B' | b'C') {
            return self.push(Node::Bytes(bytes));
        }
        let text = String::from_utf8(bytes).map_err(|_| self.broken("text that is not UTF-8"))?;
        self.push(Node::Text(text))
    }

    fn container(&mut self, opcode: u8) -> Result<(), PthFault> {
        let node = match opcode {
            b'}' => Node::Dict(Vec::new()),
            b']' => Node::List(Vec::new()),
            b')' => Node::Tuple(Vec::new()),
            b'd' => Node::Dict(self.pairs()?),
            b'l' => Node::List(self.since_mark()?),
            b't' => Node::Tuple(self.since_mark()?),
            short => {
                let count = usize::from(short - 0x84);
                let start = self.stack.len().checked_sub(count);
                let start = start.ok_or_else(|| self.broken("an empty stack"))?;
                Node::Tuple(self.stack.split_off(start))
            }
        };
        self.push(node)
    }

    fn fill(&mut self, opcode: u8) -> Result<(), PthFault> {
        let (items, pairs) = match opcode {
            b'a' => (vec![self.pop()?], Vec::new()),
            b'e' => (self.since_mark()?, Vec::new()),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                (Vec::new(), vec![(key, value)])
            }
            _ => (Vec::new(), self.pairs()?),
        };
        let target = *self.stack.last().ok_or_else(|| self.broken("an empty stack"))?;
        let of_list = matches!(opcode, b'a' | b'e');
        if let Node::List(held) = &mut self.nodes[target]
            && of_list
        {
            held.extend(items);
            return Ok(());
        }
        if let Node::Dict(held) = &mut self.nodes[target]
            && !of_list
        {
            held.extend(pairs);
            return Ok(());
        }
        Err(self.broken("items for something that holds none"))
    }

    fn construct(&mut self, opcode: u8) -> Result<(), PthFault> {
        match opcode {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Node::Global(format!("{module} {name}")))
            }
            0x93 => {
                let (name, module) = (self.pop_text()?, self.pop_text()?);
                self.push(Node::Global(format!("{module} {name}")))
            }
            b'Q' => self.storage(),
            b'R' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                let node = self.call(callable, arguments)?;
                self.push(node)
            }
            0x81 => {
                let (_, class) = (self.pop()?, self.pop()?);
                let of_settings = matches!(&self.nodes[class], Node::Global(name) if name == "argparse Namespace");
                if !of_settings {
                    return Err(refused(&self.nodes[class]));
                }
                self.push(Node::Object(None))
            }
            _ => {
                let (state, target) = (self.pop()?, *self.stack.last().unwrap_or(&usize::MAX));
                match self.nodes.get_mut(target) {
                    Some(Node::Object(attributes)) => *attributes = Some(state),
                    // A state dict carries versions of its modules, which nothing here needs.
                    Some(Node::Dict(_)) => {}
                    _ => return Err(self.broken("a state for something that has none")),
                }
                Ok(())
            }
        }
    }

    /// A reference to a storage: `("storage", class, key, device, elements)`.
    fn storage(&mut self) -> Result<(), PthFault> {
        let reference = self.pop()?;
        let Node::Tuple(parts) = &self.nodes[reference] else {
            return Err(self.broken("a storage without its description"));
        };
        let part = |index: usize| parts.get(index).map(|&id| &self.nodes[id]);
        let (Some(Node::Text(kind)), Some(Node::Global(class)), Some(Node::Text(key))) =
            (part(0), part(1), part(2))
        else {
            return Err(self.broken("a storage with an unknown description"));
        };
        if kind != "storage" {
            return Err(self.broken("a reference to something other than a storage"));
        }
        let node = Node::Storage { class: class.clone(), key: key.clone() };
        self.push(node)
    }

    fn call(&self, callable: Id, arguments: Id) -> Result<Node, PthFault> {
        let (Node::Global(name), Node::Tuple(arguments)) =
            (&self.nodes[callable], &self.nodes[arguments])
        else {
            return Err(self.broken("a call of something that cannot be called"));
        };
        let argument = |index: usize| arguments.get(index).map(|&id| &self.nodes[id]);
        match name.as_str() {
            "collections OrderedDict" if arguments.is_empty() => Ok(Node::Dict(Vec::new())),
            "torch Size" => match argument(0) {
                Some(Node::Tuple(items)) => Ok(Node::Tuple(items.clone())),
                _ => Err(self.broken("a size without numbers")),
            },
            "torch._utils _rebuild_parameter" => match argument(0) {
                Some(Node::Tensor(tensor)) => Ok(Node::Tensor(tensor.clone())),
                _ => Err(self.broken("a parameter without its tensor")),
            },
            "torch._utils _rebuild_tensor_v2" => {
                let (Some(Node::Storage { class, key }), Some(Node::Int(offset))) =
                    (argument(0), argument(1))
                else {
                    return Err(self.broken("a tensor without its storage"));
                };
                let offset =
                    u64::try_from(*offset).map_err(|_| self.broken("a negative offset"))?;
                let shape = self.sizes(argument(2))?;
                let strides = self.sizes(argument(3))?;
                let (class, key) = (class.clone(), key.clone());
                Ok(Node::Tensor(TensorNode { class, key, offset, shape, strides }))
            }
            _ => Err(refused(&self.nodes[callable])),
        }
    }

    fn sizes(&self, node: Option<&Node>) -> Result<Vec<u64>, PthFault> {
        let Some(Node::Tuple(items)) = node else {
            return Err(self.broken("a tensor without its shape"));
        };
        let size = |&id: &Id| {
            let Node::Int(size) = &self.nodes[id] else {
                return Err(self.broken("a size that is no number"));
            };
            u64::try_from(*size).map_err(|_| self.broken("a negative size"))
        };
        items.iter().map(size).collect()
    }

    fn push(&mut self, node: Node) -> Result<(), PthFault> {
        if self.nodes.len() >= NODES_MAX {
            return Err(self.broken("more values than any checkpoint has"));
        }
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, PthFault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.broken("an empty stack"));
        }
        Ok(self.stack.pop().expect("it is above the floor"))
    }

    fn pop_text(&mut self) -> Result<String, PthFault> {
        let id = self.pop()?;
        let Node::Text(text) = &self.nodes[id] else {
            return Err(self.broken("a name that is no text"));
        };
        Ok(text.clone())
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, PthFault> {
        let mark = self.marks.pop().ok_or_else(|| self.broken("a missing mark"))?;
        Ok(self.stack.split_off(mark))
    }

    fn pairs(&mut self) -> Result<Vec<(Id, Id)>, PthFault> {
        let items = self.since_mark()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.broken("a key without a value"));
        }
        Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
    }

    fn byte(&mut self) -> Result<u8, PthFault> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PthFault> {
        Ok(self.take(N)?.try_into().expect("the length is asked for"))
    }

    /// A little-endian number of `width` bytes, at most 8.
    fn unsigned(&mut self, width: usize) -> Result<u64, PthFault> {
        let mut wide = [0; 8];
        wide[..width].copy_from_slice(self.take(width)?);
        Ok(u64::from_le_bytes(wide))
    }

    fn line(&mut self) -> Result<String, PthFault> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&byte| byte == b'\n');
        let length = length.ok_or_else(|| self.broken("a name without an end"))?;
        let text = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.at += length + 1;
        Ok(text)
    }

    fn take(&mut self, length: usize) -> Result<&[u8], PthFault> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.broken("its end, too early"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn broken(&self, found: &str) -> PthFault {
        PthFault::Pickle { at: self.at, found: found.to_owned() }
    }
}

fn refused(node: &Node) -> PthFault {
    let name =
        if let Node::Global(name) = node { name.clone() } else { "something unnamed".to_owned() };
    PthFault::Refused { name }
}
