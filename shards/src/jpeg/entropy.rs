//! Huffman decoding of baseline JPEG: the bits of a scan to the coefficients of blocks.
//!
//! One look-up of eleven bits gives a symbol's run, its length and for all but the rarest also the
//! coefficient itself. Whatever is out of the ordinary (a code that no table has, a coefficient beyond
//! the last, more bits than there are) is answered with [`Odd`]: the caller then asks libjpeg-turbo,
//! whose word on damaged images is the only one.

/// Something that libjpeg-turbo may see otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Odd;

/// Bits that index a table.
const LOOK: u32 = 11;
const ENTRIES: usize = 1 << LOOK;

/// Coefficients of a block.
pub(super) const BLOCK: usize = 64;

/// Places of coefficients in their order in the file.
pub(super) const ZIGZAG: [u8; BLOCK] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// A coefficient's value lies in the upper half of an entry.
const VALUE: u32 = 16;
/// The entry has no value: the bits that follow the code do.
const BITS_FOLLOW: u32 = 1 << 14;
/// The block ends here, or the code is longer than the table's.
const SPECIAL: u32 = 1 << 15;
const UNUSUAL: u32 = BITS_FOLLOW | SPECIAL;
/// Where an entry has the number of bits that follow, and how far to go on in the block.
const SIZE: u32 = 10;
const SKIP: u32 = 5;
/// Bits to take: of the code, and of the value where the entry has it.
const LENGTH_MASK: u32 = 31;

/// What a table's symbols are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sizes of differences.
    Dc,
    /// Runs of zeros and sizes of coefficients.
    Ac,
}

/// A Huffman table as it is read.
#[derive(Debug, Clone)]
pub(super) struct Table {
    entries: Box<[u32; ENTRIES]>,
    /// One more than the largest code of each length, left-aligned in 16 bits; 0 if there is none.
    ends: [u32; 17],
    /// What to add to a code of each length to find its symbol.
    offsets: [i32; 17],
    symbols: [u8; 256],
}

impl Default for Table {
    fn default() -> Self {
        Self {
            entries: vec![SPECIAL; ENTRIES].into_boxed_slice().try_into().expect("as many"),
            ends: [0; 17],
            offsets: [0; 17],
            symbols: [0; 256],
        }
    }
}

impl Table {
    /// Makes this the table whose codes of length `l` number `counts[l - 1]`.
    pub(super) fn set(&mut self, kind: Kind, counts: &[u8; 16], symbols: &[u8]) -> Result<(), Odd> {
        let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
        if total > symbols.len() || total > self.symbols.len() {
            return Err(Odd);
        }
        self.symbols[..total].copy_from_slice(&symbols[..total]);
        self.entries.fill(SPECIAL);
        self.ends = [0; 17];
        let (mut code, mut place) = (0_u32, 0_usize);
        for (length, &count) in (1_u32..).zip(counts) {
            self.offsets[length as usize] =
                i32::try_from(place).map_err(|_| Odd)? - i32::try_from(code).map_err(|_| Odd)?;
            for _ in 0..count {
                if code >= 1 << length {
                    return Err(Odd);
                }
                let symbol = symbols[place];
                if kind == Kind::Dc && symbol > 15 {
                    return Err(Odd);
                }
                if length <= LOOK {
                    let first = (code << (LOOK - length)) as usize;
                    let range = &mut self.entries[first..][..1 << (LOOK - length)];
                    fill(range, kind, symbol, length);
                }
                place += 1;
                code += 1;
            }
            if count > 0 {
                self.ends[length as usize] = code << (16 - length);
            }
            code <<= 1;
        }
        Ok(())
    }

    #[inline(always)]
    fn look(&self, bits: &Bits<'_>) -> u32 {
        self.entries[(bits.buffer >> (64 - LOOK)) as usize]
    }

    /// The symbol of a code that is longer than the table's index.
    #[cold]
    fn long(&self, bits: &mut Bits<'_>) -> Result<u8, Odd> {
        let ahead = u32::try_from(bits.buffer >> 48).expect("16 bits");
        for length in LOOK + 1..=16 {
            if ahead < self.ends[length as usize] {
                let code = i32::try_from(ahead >> (16 - length)).expect("16 bits");
                bits.take(length);
                let place = code + self.offsets[length as usize];
                let place = usize::try_from(place).map_err(|_| Odd)?;
                return self.symbols.get(place).copied().ok_or(Odd);
            }
        }
        Err(Odd)
    }
}

/// The entries of one code: all continuations of its bits.
fn fill(range: &mut [u32], kind: Kind, symbol: u8, length: u32) {
    let (run, size) = match kind {
        Kind::Dc => (0, u32::from(symbol)),
        Kind::Ac => (u32::from(symbol >> 4), u32::from(symbol & 15)),
    };
    let skip = (run + 1) << SKIP;
    let free = LOOK - length;
    if kind == Kind::Ac && size == 0 {
        // Sixteen zeros, or the end of the block.
        range.fill(if run == 15 { 16 << SKIP | length } else { SPECIAL | 1 << SIZE | length });
    } else if size <= free {
        let each = 1_usize << (free - size);
        for (value, range) in (0..).zip(range.chunks_exact_mut(each)) {
            let value = u32::from(extend(value, size).cast_unsigned());
            range.fill(value << VALUE | skip | (length + size));
        }
    } else {
        range.fill(BITS_FOLLOW | size << SIZE | skip | length);
    }
}

/// A value from the bits that encode it: those that begin with 0 are negative.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "at most 15 bits and a sign")]
fn extend(bits: u32, size: u32) -> i16 {
    let bits = bits.cast_signed();
    if size == 0 {
        0
    } else if bits < 1 << (size - 1) {
        (bits - (1 << size) + 1) as i16
    } else {
        bits as i16
    }
}

/// The bits of a scan, without the zeros that are stuffed after bytes of 255.
#[derive(Debug)]
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, from the highest on.
    buffer: u64,
    /// How many of them are valid.
    count: u32,
}

/// Zeros after the bits, so that eight bytes can be read wherever there are bits.
pub(super) const PADDING: usize = 16;

impl<'a> Bits<'a> {
    /// `bytes` end with [`PADDING`] zeros.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, buffer: 0, count: 0 }
    }

    /// After this there are at least 56 bits, or the end has been passed.
    #[inline(always)]
    fn refill(&mut self) {
        if let Some(next) = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<8>()) {
            self.buffer |= u64::from_be_bytes(*next) >> self.count;
            self.at += ((63 - self.count) >> 3) as usize;
        }
        self.count |= 56;
    }

    #[inline(always)]
    fn take(&mut self, count: u32) {
        self.buffer <<= count;
        self.count = self.count.wrapping_sub(count);
    }

    /// The value in the next `size` bits, which are 1 to 15.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "at most 15 bits are left")]
    fn value(&mut self, size: u32) -> i16 {
        let bits = (self.buffer >> (64 - size)) as u32;
        self.take(size);
        extend(bits, size)
    }

    /// How many bits there are behind the last that was taken. None: more have been taken than there are.
    pub(super) fn left(&self) -> Option<usize> {
        // A refill that found too little left `at` where it was, before the last eight bytes.
        let whole = self.at + 8 <= self.bytes.len() && self.count <= 64;
        let taken = (self.at * 8).checked_sub(self.count as usize).filter(|_| whole)?;
        ((self.bytes.len() - PADDING) * 8).checked_sub(taken)
    }
}

/// The difference of a block's first coefficient from that of the block before.
#[inline(always)]
pub(super) fn difference(bits: &mut Bits<'_>, table: &Table) -> Result<i16, Odd> {
    bits.refill();
    let entry = table.look(bits);
    if entry & UNUSUAL == 0 {
        bits.take(entry & LENGTH_MASK);
        return Ok((entry.cast_signed() >> VALUE) as i16);
    }
    let size = if entry & SPECIAL == 0 {
        bits.take(entry & LENGTH_MASK);
        entry >> SIZE & 15
    } else {
        u32::from(table.long(bits)?)
    };
    Ok(if size == 0 { 0 } else { bits.value(size) })
}

/// Reads the other coefficients of a block. With `KEEP` they are written to `block`, whose other places
/// stay as they are.
#[inline(always)]
pub(super) fn coefficients<const KEEP: bool>(
    bits: &mut Bits<'_>,
    table: &Table,
    block: &mut [i16; BLOCK],
) -> Result<(), Odd> {
    /// Look-ups for which the bits of a refill suffice: 4 * 11 are less than 56.
    const AHEAD: usize = 4;
    let mut next = 1_usize;
    'block: loop {
        bits.refill();
        let mut entry = 0;
        for _ in 0..AHEAD {
            entry = table.look(bits);
            if entry & UNUSUAL != 0 {
                break;
            }
            bits.take(entry & LENGTH_MASK);
            next += (entry >> SKIP & 31) as usize;
            if KEEP {
                let place = ZIGZAG[(next - 1) & (BLOCK - 1)];
                block[usize::from(place) & (BLOCK - 1)] = (entry.cast_signed() >> VALUE) as i16;
            }
            if next >= BLOCK {
                break 'block;
            }
        }
        if entry & UNUSUAL == 0 {
            continue;
        }
        bits.refill();
        let (skip, size) = if entry & SPECIAL == 0 {
            bits.take(entry & LENGTH_MASK);
            (entry >> SKIP & 31, entry >> SIZE & 15)
        } else if entry >> SIZE & 15 != 0 {
            bits.take(entry & LENGTH_MASK);
            return Ok(());
        } else {
            match table.long(bits)? {
                symbol if symbol & 15 != 0 => (u32::from(symbol >> 4) + 1, u32::from(symbol & 15)),
                0xF0 => (16, 0),
                _ => return Ok(()),
            }
        };
        next += skip as usize;
        if size > 0 {
            let value = bits.value(size);
            if KEEP {
                let place = ZIGZAG[(next - 1) & (BLOCK - 1)];
                block[usize::from(place) & (BLOCK - 1)] = value;
            }
        }
        if next >= BLOCK {
            break;
        }
    }
    if next == BLOCK { Ok(()) } else { Err(Odd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes 00, 01, 10 and a long one of twelve bits.
    fn table(kind: Kind, symbols: [u8; 4]) -> Table {
        let mut counts = [0; 16];
        (counts[1], counts[11]) = (3, 1);
        let mut table = Table::default();
        table.set(kind, &counts, &symbols).unwrap();
        table
    }

    fn padded(bytes: &[u8]) -> Vec<u8> {
        [bytes, &[0; PADDING]].concat()
    }

    #[test]
    fn values_are_read_with_their_runs() {
        // 0x01: a coefficient of one bit; 0x25: two zeros and five bits; 0x00: the end.
        let table = table(Kind::Ac, [0x01, 0x25, 0x00, 0x3A]);
        // 00 1 | 01 10110 | 110000000000 1111111111 | 00 0 | 10
        let bytes = padded(&[0b0010_1101, 0b1011_0000, 0b0000_0011, 0b1111_1111, 0b0001_0000]);
        let (mut bits, mut block) = (Bits::new(&bytes), [0; BLOCK]);
        coefficients::<true>(&mut bits, &table, &mut block).unwrap();
        let mut expected = [0; BLOCK];
        let mut put = |place: usize, value| expected[usize::from(ZIGZAG[place])] = value;
        for (place, value) in [(1, 1), (4, 22), (8, 1023), (9, -1)] {
            put(place, value);
        }
        assert_eq!(block, expected);
        assert_eq!(bits.left(), Some(3));
    }

    #[test]
    fn differences_have_signs() {
        let table = table(Kind::Dc, [0, 1, 3, 11]);
        // 00 | 01 0 | 10 011 | 110000000000 01111111111
        let bytes = padded(&[0b0001_0100, 0b1111_0000, 0b0000_0001, 0b1111_1111, 0b1000_0000]);
        let mut bits = Bits::new(&bytes);
        let found: Vec<i16> = (0..4).map(|_| difference(&mut bits, &table).unwrap()).collect();
        assert_eq!(found, [0, -1, -4, -1024]);
    }

    #[test]
    fn what_is_out_of_the_ordinary_is_odd() {
        let far = table(Kind::Ac, [0xF0, 0x01, 0x00, 0x3A]);
        let mut block = [0; BLOCK];
        // Five times sixteen zeros are more than a block has.
        let bytes = padded(&[0, 0]);
        assert_eq!(coefficients::<true>(&mut Bits::new(&bytes), &far, &mut block), Err(Odd));
        // Twelve ones are no code.
        let bytes = padded(&[255, 255]);
        assert_eq!(coefficients::<false>(&mut Bits::new(&bytes), &far, &mut block), Err(Odd));
        // There are fewer bits than are read.
        let bytes = padded(&[0b0110_0000]);
        let mut bits = Bits::new(&bytes);
        let short = table(Kind::Dc, [0, 8, 3, 11]);
        difference(&mut bits, &short).unwrap();
        assert_eq!(bits.left(), None);
        let mut counts = [0; 16];
        counts[0] = 3;
        assert_eq!(Table::default().set(Kind::Ac, &counts, &[1, 2, 3]), Err(Odd));
        counts[0] = 1;
        assert_eq!(Table::default().set(Kind::Dc, &counts, &[16]), Err(Odd));
    }
}
