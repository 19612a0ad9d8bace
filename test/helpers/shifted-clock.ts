/** `node --import` of this sets the process's clock forth or back by CLOCK_SHIFT_MS, as on a host whose clock is wrong. */
const RealDate = Date
const shiftMs = Number(process.env.CLOCK_SHIFT_MS)

globalThis.Date = class extends RealDate {
  constructor(...parts: ConstructorParameters<DateConstructor> | []) {
    if (parts.length === 0) super(RealDate.now() + shiftMs)
    else super(...parts)
  }

  static override now(): number {
    return RealDate.now() + shiftMs
  }
} as DateConstructor

export {}
