const NONE = 0
const NODES_A_TURN = 32 * 1024

/**
 * Finds any number of values in a text in one pass (Aho and Corasick, "Efficient string matching",
 * 1975). The values form a trie: each node is a prefix of a value. After each byte of the text, the
 * search is at the node of the longest prefix that the text ends with.
 *
 * Node 0 is the root. A node's first child is the next node, unless that was taken; its other
 * children are in a table of 256 nodes. Few nodes have a table, so a value costs about 18 bytes per
 * byte.
 */
export class ValueSearch {
  readonly longestValue: number
  /** Byte of the child that is the next node, plus one. 0: the next node is no child. */
  readonly #nextByte: Uint16Array
  /** Index of the node's table, plus one. 0: no table. */
  readonly #table: Int32Array
  #tables: Int32Array = new Int32Array(256)
  #tableCount = 1
  /** Node of the longest proper suffix that is a prefix, too (the failure link). */
  readonly #shorter: Int32Array
  readonly #depth: Int32Array
  /** Length of the longest value that ends at the node; 0: none. */
  readonly #found: Int32Array
  #nodeCount = 1
  readonly #building: Generator<void, void>

  constructor(values: readonly Buffer[]) {
    const nodesMax = values.reduce((sum, { length }) => sum + length, 1)
    this.longestValue = values.reduce((longest, { length }) => Math.max(longest, length), 0)
    this.#nextByte = new Uint16Array(nodesMax)
    this.#table = new Int32Array(nodesMax)
    this.#table[0] = 1
    this.#shorter = new Int32Array(nodesMax)
    this.#depth = new Int32Array(nodesMax)
    this.#found = new Int32Array(nodesMax)
    this.#building = this.#build(values)
  }

  /** Builds a part of the trie. Returns false once it is complete. */
  buildNext(): boolean {
    return !this.#building.next().done
  }

  /**
   * Searches a piece of text from a node (first: 0, the root), and returns the node after its last
   * byte. Calls `onFound` with the start and end of each value; if several end at a byte, of the
   * longest.
   */
  read(node: number, text: Buffer, onFound: (from: number, to: number) => void): number {
    const found = this.#found
    let at = node
    for (let index = 0; index < text.length; index += 1) {
      at = this.#step(at, text[index] ?? 0)
      const length = found[at] ?? 0
      if (length > 0) onFound(index + 1 - length, index + 1)
    }
    return at
  }

  /** Returns how many bytes at the end of the text may be the prefix of a value. */
  openBytes(node: number): number {
    let at = node
    // A node without children is a complete value.
    while (at !== 0 && this.#nextByte[at] === 0 && this.#table[at] === 0)
      at = this.#shorter[at] ?? 0
    return this.#depth[at] ?? 0
  }

  /** Falls back to shorter prefixes until one continues with the byte; the root has a table. */
  #step(node: number, byte: number): number {
    for (let at = node; ; at = this.#shorter[at] ?? 0) {
      if (this.#nextByte[at] === byte + 1) return at + 1
      const table = this.#table[at] ?? 0
      if (table === 0) continue
      const child = this.#tables[(table - 1) * 256 + byte] ?? NONE
      if (child !== NONE || at === 0) return child
    }
  }

  /** Returns the node's child; 0, the root, means none. */
  #child(node: number, byte: number): number {
    if (this.#nextByte[node] === byte + 1) return node + 1
    const table = this.#table[node] ?? 0
    return table === 0 ? NONE : (this.#tables[(table - 1) * 256 + byte] ?? NONE)
  }

  *#build(values: readonly Buffer[]): Generator<void, void> {
    let nextStop = NODES_A_TURN
    for (const value of values) {
      this.#add(value)
      if (this.#nodeCount < nextStop) continue
      nextStop = this.#nodeCount + NODES_A_TURN
      yield
    }
    // In order of depth: failure links lead to nodes nearer to the root.
    const order = new Int32Array(this.#nodeCount)
    let known = 1
    for (let index = 0; index < known; index += 1) {
      const node = order[index] ?? 0
      for (const [byte, child] of this.#children(node)) {
        const shorter = node === 0 ? 0 : this.#step(this.#shorter[node] ?? 0, byte)
        this.#shorter[child] = shorter
        if (this.#found[child] === 0) this.#found[child] = this.#found[shorter] ?? 0
        order[known] = child
        known += 1
      }
      if (index % NODES_A_TURN === NODES_A_TURN - 1) yield
    }
  }

  #add(value: Buffer): void {
    let node = 0
    for (const byte of value) {
      const child = this.#child(node, byte)
      node = child === NONE ? this.#newChild(node, byte) : child
    }
    this.#found[node] = value.length
  }

  #newChild(node: number, byte: number): number {
    const child = this.#nodeCount
    this.#nodeCount += 1
    this.#depth[child] = (this.#depth[node] ?? 0) + 1
    if (child === node + 1 && node !== 0) this.#nextByte[node] = byte + 1
    else {
      const table = this.#tableOf(node)
      this.#tables[table * 256 + byte] = child
    }
    return child
  }

  /** Returns the index of the node's table, which it creates if needed. */
  #tableOf(node: number): number {
    const known = this.#table[node] ?? 0
    if (known !== 0) return known - 1
    const table = this.#tableCount
    this.#tableCount += 1
    this.#table[node] = this.#tableCount
    if (this.#tables.length < this.#tableCount * 256) {
      const grown = new Int32Array(this.#tables.length * 2)
      grown.set(this.#tables)
      this.#tables = grown
    }
    return table
  }

  *#children(node: number): Generator<[byte: number, child: number]> {
    const nextByte = this.#nextByte[node] ?? 0
    if (nextByte !== 0) yield [nextByte - 1, node + 1]
    const table = this.#table[node] ?? 0
    if (table === 0) return
    for (let byte = 0; byte < 256; byte += 1) {
      const child = this.#tables[(table - 1) * 256 + byte] ?? NONE
      if (child !== NONE) yield [byte, child]
    }
  }
}
