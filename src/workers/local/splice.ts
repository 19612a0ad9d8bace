/**
 * Moves bytes from a pipe into a file. With splice(2) they never leave the kernel, so that a kill
 * at any time loses none. Where Node cannot call it, they are read and written, and a kill in
 * between loses what was read.
 */
import { readSync, writeSync } from 'node:fs'
import { getSystemErrorName } from 'node:util'
import { codeOf } from './failures.ts'

/** Capacity of a pipe. */
const CHUNK_BYTES = 64 * 1024
/** SPLICE_F_MOVE and SPLICE_F_NONBLOCK. */
const FLAGS = 3
const EAGAIN = 11
/** EPERM, EINVAL and ENOSYS: the file system or a seccomp filter does not allow it. */
const UNSUPPORTED: readonly number[] = [1, 22, 38]

const splice = openSplice()
let isSupported = splice !== undefined
let chunk: Buffer | undefined

/**
 * Moves at most a chunk from the pipe to the offset `at` of the file. Returns the number of bytes;
 * 0 if the pipe was empty. `pipe` must be non-blocking. Throws errors of the file: the bytes are
 * then still in the pipe, or lost if splice(2) is not available.
 */
export function moveChunk(pipe: number, file: number, at: number): number {
  if (isSupported) {
    const { bytes, errno } = splice?.(pipe, file, at) ?? { bytes: -1, errno: UNSUPPORTED[0] ?? 0 }
    if (bytes >= 0) return bytes
    if (errno === EAGAIN) return 0
    if (!UNSUPPORTED.includes(errno)) throw systemError(errno)
    isSupported = false
  }
  const read = readChunk(pipe)
  for (let written = 0; written < read.length; ) {
    written += writeSync(file, read, written, read.length - written, at + written)
  }
  return read.length
}

/** Discards at most a chunk from the pipe. Returns the number of bytes. */
export function discardChunk(pipe: number): number {
  return readChunk(pipe).length
}

function readChunk(pipe: number): Buffer {
  chunk ??= Buffer.allocUnsafeSlow(CHUNK_BYTES)
  try {
    return chunk.subarray(0, readSync(pipe, chunk))
  } catch (err) {
    if (codeOf(err) !== 'EAGAIN') throw err
    return chunk.subarray(0, 0)
  }
}

function systemError(errno: number): Error {
  const code = getSystemErrorName(-errno)
  return Object.assign(new Error(`${code}: splice`), { code, syscall: 'splice' })
}

type Splice = (pipe: number, file: number, at: number) => { bytes: number; errno: number }

/** Returns undefined before Node 26.1, and if Node was built without `node:ffi`. */
function openSplice(): Splice | undefined {
  const ffi = process.getBuiltinModule('node:ffi')
  if (!ffi) return undefined
  const { functions } = ffi.dlopen(null, {
    splice: {
      arguments: ['int32', 'pointer', 'int32', 'buffer', 'uint64', 'uint32'],
      return: 'int64',
    },
    __errno_location: { arguments: [], return: 'pointer' },
  })
  // errno of this thread.
  const errnoAt = functions.__errno_location()
  const offset = Buffer.alloc(8)
  return (pipe, file, at) => {
    offset.writeBigInt64LE(BigInt(at))
    const bytes = functions.splice(pipe, 0n, file, offset, BigInt(CHUNK_BYTES), FLAGS)
    return { bytes: Number(bytes), errno: ffi.getInt32(errnoAt, 0) }
  }
}
